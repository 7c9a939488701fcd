-- Settings that pgvigil owns with their running values, and whether any setting waits for a restart.
-- Role: pg_read_all_settings (pg_monitor). Versions: 14 to 18. Columns: name, setting, source, sourcefile, pending_restart.
select name, setting, source, coalesce(sourcefile, '') as sourcefile, pending_restart
from pg_settings
where pending_restart or name in (<owned>);
