"""What Neuroglancer is shown, the local server of its files, and the contact sheet."""
