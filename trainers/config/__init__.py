"""`TrainConfig`: what a run is told, by TOML, presets or options, and what is refused."""
