-- What one session of ours waits for.
-- Role: any (own sessions), pg_monitor. Versions: 14 to 18. Columns: wait_event.
select coalesce(wait_event, '') as wait_event from pg_stat_activity where pid = <pid>;
