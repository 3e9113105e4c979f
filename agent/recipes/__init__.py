"""Settings of whole runs, one TOML file each."""
