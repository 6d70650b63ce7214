"""Bad sections: measured, judged, recorded."""
