-- Who streams from here. The agents' own connections, which ask for the timeline, are left out.
-- Role: pg_monitor. Versions: 14 to 18. Columns: as named below.
select
  pid,
  application_name,
  coalesce(state, '') as state,
  flush_lsn as flushed,
  replay_lsn as replayed,
  coalesce(sync_priority, 0) as sync_priority,
  (extract(epoch from clock_timestamp() - reply_time) * 1000)::bigint as reply_age_ms
from pg_stat_replication
where application_name <> 'pgvigil_observer'
order by pid;
