"""The queue: jobs are files in a folder (`queue`), and each runs in a process of its own (`worker`)."""
