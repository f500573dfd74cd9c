//! Reads configurations: presets, YAML, overrides, validation.
