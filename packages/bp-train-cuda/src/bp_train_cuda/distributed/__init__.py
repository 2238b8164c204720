"""Training in several processes: the process group, FSDP2 sharding, and the rules for what several ranks can train.

Reading starts in `process_group.ProcessGroup`, the interface that the training loop sees. `sharding` splits weights
among ranks with FSDP2, and `rules` rejects what several processes cannot train together.
"""
