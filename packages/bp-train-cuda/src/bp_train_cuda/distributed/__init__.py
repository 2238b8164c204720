"""Training in several processes: the process group, FSDP2 sharding, and the rules for what several ranks can train.

Reading starts in `process_group.ProcessGroup`, the interface that the training loop sees. `launch` opens a group for
each training, over the signed messages of `store`. `sharding` splits weights among ranks with FSDP2, and `rules`
rejects what several processes can't train together.
"""
