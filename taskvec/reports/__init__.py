"""What a comparison and a validation found: as JSON, as text, as an HTML page."""
