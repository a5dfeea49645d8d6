"""The scripts of docs/research are no package: their folders are put where Python looks."""

import sys
from pathlib import Path

RESEARCH = Path(__file__).parents[2] / "docs" / "research"
sys.path += sorted({str(script.parent) for script in RESEARCH.glob("*/*.py")})
