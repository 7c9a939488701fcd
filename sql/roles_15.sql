-- CHECKPOINT without being superuser: the agent before a switchover, the rewind role when the new leader has made none yet.
-- Role: superuser. Versions: 15 to 18 (on 14 the agent uses its superuser for CHECKPOINT). Columns: none.
grant pg_checkpoint to pgvigil;
grant pg_checkpoint to pgvigil_rewind;
