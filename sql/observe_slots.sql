-- Physical replication slots.
-- Role: any. Versions: 14 to 18. Columns: slot_name, restart_lsn, active, wal_status.
select slot_name, restart_lsn, active, coalesce(wal_status, '') as wal_status
from pg_replication_slots
where slot_type = 'physical' and not temporary
order by slot_name;
