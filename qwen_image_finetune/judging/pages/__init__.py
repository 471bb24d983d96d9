"""Pages of one file about runs: what stands in a run's folder, drawn as HTML and SVG without any network."""
