"""The documentation site: ``make docs`` builds it into ``build/docs``, without a network."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from lightning_kd import __version__  # noqa: E402

project = "lightning-kd"
author = "lightning_kd developers"
copyright = "lightning_kd developers, Apache-2.0"  # noqa: A001  Sphinx's own name
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
    "site_extension",
]
# Links into other projects' sites need their inventories, which only a network gives.
if os.environ.get("DOCS_NETWORK"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable", None),
    }

exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_block"]
myst_heading_anchors = 4  # the anchors that a code host gives to headings

autodoc_default_options = {"show-inheritance": True, "member-order": "bysource"}
# Parts of an annotation that Sphinx takes for a name.
nitpick_ignore_regex = [("py:.*", r".*\[.*")]
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries_show_parents = "hide"
autosummary_generate = False

html_theme = "pydata_sphinx_theme"
html_title = "lightning-kd"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "lightning-kd"},
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "show_toc_level": 1,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"get_started": []}
html_context = {"default_mode": "auto"}
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
