"""Every stream, key, group and time limit on the broker, in one place.

work                     stream   WorkUnit entries; group `generators`
batches:{run}            stream   SampleBatch entries; group `trainer`
dead                     stream   DeadLetter entries: what was delivered too often, or failed
blob:{id}                string   safetensors bytes that an entry points to (claim check)
done:{unit}              string   marker: this work unit's batch is published
plan:{run}:{feedback}    string   marker: this feedback is planned; holds the reply
"""

WORK = "work"
WORK_GROUP = "generators"
BATCH_GROUP = "trainer"
DEAD = "dead"

BLOB_TTL_S = 24 * 3600
MARKER_TTL_S = 7 * 24 * 3600


def batches(run: str) -> str:
    return f"batches:{run}"


def blob(blob_id: str) -> str:
    return f"blob:{blob_id}"


def done(unit_id: str) -> str:
    return f"done:{unit_id}"


def plan(run: str, feedback: int) -> str:
    return f"plan:{run}:{feedback}"
