"""Where analysis results go: plain values for JSON, a picture, and a page."""
