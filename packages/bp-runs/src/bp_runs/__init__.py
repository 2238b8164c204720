"""What a training run is: spec, events, outcome, record, adapter folder, coded errors. No framework."""
