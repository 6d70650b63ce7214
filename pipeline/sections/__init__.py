"""Bad sections: sampled (survey), measured and judged by rules (quality), checked and recorded (bad_sections)."""
