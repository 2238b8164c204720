"""How Sphinx builds the handbook: `just docs-site`."""

project = "Backpropagate"
author = "The Backpropagate developers"
copyright = author
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_site", "reference/schemas"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
html_theme = "furo"
html_title = "Backpropagate"
html_extra_path = ["llms.txt"]
suppress_warnings = ["misc.highlighting_failure"]
