"""Where the package, its checkout and the files that come with it lie."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent  # holds params/, notebooks/, workflow/; of an installed package none of these
RESOURCES = PACKAGE / "resources"
