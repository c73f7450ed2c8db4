"""The schema of result files, and their comparison."""

from mla.bench.results.file import content as content
from mla.bench.results.file import decode as decode
from mla.bench.results.file import decoded as decoded
from mla.bench.results.file import encode as encode
from mla.bench.results.file import read as read
from mla.bench.results.file import write as write
from mla.bench.results.schema import SCHEMA_VERSION as SCHEMA_VERSION
from mla.bench.results.schema import Agreement as Agreement
from mla.bench.results.schema import BackendFacts as BackendFacts
from mla.bench.results.schema import Case as Case
from mla.bench.results.schema import Ceiling as Ceiling
from mla.bench.results.schema import Cost as Cost
from mla.bench.results.schema import Latency as Latency
from mla.bench.results.schema import Memory as Memory
from mla.bench.results.schema import NewLengths as NewLengths
from mla.bench.results.schema import Plan as Plan
from mla.bench.results.schema import Planned as Planned
from mla.bench.results.schema import Roofline as Roofline
from mla.bench.results.schema import Run as Run
from mla.bench.results.schema import Stage as Stage
from mla.bench.results.schema import Throughput as Throughput
from mla.bench.results.schema import Timing as Timing
from mla.verify.verdict import Check as Check
