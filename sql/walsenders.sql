-- Walsenders with the priority that each gives its standby under the rule that it has loaded itself.
-- Role: pg_monitor. Versions: 14 to 18. Columns: as named below.
select
  pid,
  application_name,
  coalesce(state, '') as state,
  coalesce(sync_priority, 0) as sync_priority,
  coalesce(flush_lsn::text, '') as flushed,
  extract(epoch from backend_start)::text as started
from pg_stat_replication
where application_name <> 'pgvigil_observer'
order by backend_start desc, pid desc;
