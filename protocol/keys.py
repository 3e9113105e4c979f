"""Every stream, key, group and time limit on the broker, in one place.

work                     stream   WorkUnit entries; group `generators`
batches:{run}            stream   SampleBatch entries; group `trainer`
dead                     stream   DeadLetter entries: what was delivered too often, or failed
blob:{id}                string   safetensors bytes that an entry points to (claim check)
staged:{delivery}        string   what is about to be a blob, for a moment
done:{unit}              string   marker: this work unit's batch is published
plan:{run}:{feedback}    string   marker: this feedback is planned; holds the reply
replicas, runs           set      names of those that told of themselves
replica:{name}           string   Replica: what a generator says of itself
run:{name}               string   RunStatus: what a trainer says of its run
shown:{run}              list     ShownSample, newest first
versions:{name}          string   Versions of a caption; lasts as long as its maker says
weights:chosen           string   WeightsRef that all replicas shall serve; lasts while one of them does
"""

WORK = "work"
WORK_GROUP = "generators"
BATCH_GROUP = "trainer"
DEAD = "dead"
REPLICAS = "replicas"
RUNS = "runs"
CHOICE = "weights:chosen"

BLOB_TTL_S = 24 * 3600
STAGED_TTL_S = 60
MARKER_TTL_S = 7 * 24 * 3600
REPLICA_TTL_S = 10  # a replica that says nothing for so long is forgotten
CHOICE_TTL_S = 30
RUN_TTL_S = 7 * 24 * 3600
SHOWN_TTL_S = 24 * 3600
SHOWN_LIMIT = 96  # recent samples a run


def batches(run: str) -> str:
    return f"batches:{run}"


def blob(blob_id: str) -> str:
    return f"blob:{blob_id}"


def staged(delivery: str) -> str:
    return f"staged:{delivery}"


def done(unit_id: str) -> str:
    return f"done:{unit_id}"


def plan(run: str, feedback: int) -> str:
    return f"plan:{run}:{feedback}"


def versions(name: str) -> str:
    return f"versions:{name}"


def replica(name: str) -> str:
    return f"replica:{name}"


def run(name: str) -> str:
    return f"run:{name}"


def shown(run: str) -> str:
    return f"shown:{run}"
