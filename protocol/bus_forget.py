"""Takes everything about one run off the broker, before a run of that name starts anew.

Errors of the client library pass through: `Bus` translates them.
"""

from __future__ import annotations

import redis

from protocol import keys
from protocol.bus_blobs import BlobStore
from protocol.bus_inbox import Inbox
from protocol.entries import SampleBatch, WorkUnit


def forget(run: str, client: redis.Redis, blobs: BlobStore, work: Inbox[WorkUnit], batches: Inbox[SampleBatch]) -> None:
    """Units that wait or are in work, answers, blobs and markers; dead letters excepted."""
    while asked := [(entry_id, unit) for entry_id, unit in work.peek() if unit.run == run]:
        for entry_id, unit in asked:  # one that a worker puts back meanwhile is found at the next look
            client.xack(keys.WORK, keys.WORK_GROUP, entry_id)
            client.xdel(keys.WORK, entry_id)
            blobs.drop(unit.init_blob)
    for _, batch in batches.peek():
        blobs.drop(batch.blob)
        blobs.drop(batch.init_blob)
    done = client.scan_iter(match=keys.done(f"{run}.*"))  # of the runs {run}.{anything} too
    markers = [key for key in done if key.decode().rsplit(".", 3)[0] == keys.done(run)]
    plans = client.scan_iter(match=f"plan:{run}:*")
    client.unlink(keys.batches(run), *markers, *plans)
