"""A server that scores images for other machines, and the download of reward weights."""
