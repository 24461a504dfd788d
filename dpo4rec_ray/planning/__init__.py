"""What a run will take: its rows and tokens, then time, GPU hours and storage per stage. Starts nothing, imports no Ray."""
