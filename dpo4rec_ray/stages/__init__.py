"""One file per stage: `run(config, store, round_id) -> Outcome` places plain objects on Ray and writes an artifact."""
