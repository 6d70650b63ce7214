"""What Neuroglancer shows (layers, state), the local server of its files, and the contact sheet."""
