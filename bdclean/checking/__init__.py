"""Is this model backdoored? Tests that need no label and no trigger."""

from bdclean.checking.embeddings import LARGE as LARGE
from bdclean.checking.embeddings import SmallestTrigger as SmallestTrigger
from bdclean.checking.embeddings import TriggerSearch as TriggerSearch
from bdclean.checking.embeddings import smallest_trigger as smallest_trigger
from bdclean.checking.every import TESTS as TESTS
from bdclean.checking.every import run_tests as run_tests
from bdclean.checking.flips import Flips as Flips
from bdclean.checking.flips import Gathered as Gathered
from bdclean.checking.flips import count_flips as count_flips
from bdclean.checking.flips import gather_features as gather_features
from bdclean.checking.margins import Margins as Margins
from bdclean.checking.margins import MarginTest as MarginTest
from bdclean.checking.margins import maximum_margins as maximum_margins
from bdclean.checking.verdicts import Verdict as Verdict
from bdclean.functional.families import PROBES as PROBES
