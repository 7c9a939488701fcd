-- Sessions that the startup process waits for: holders of the lock that it wants, else, in another replay conflict, whoever
-- has a snapshot or runs a query.
-- Role: pg_monitor. Versions: 14 to 18. Columns: pid, active.
with startup as (
  select pid, wait_event_type, wait_event from pg_stat_activity where backend_type = 'startup'
), wanted as (
  select l.* from pg_locks l join startup on startup.pid = l.pid where not l.granted
), holders as (
  select l.pid
  from wanted w
    join pg_locks l on l.granted and l.pid <> w.pid and l.locktype = w.locktype
      and l.database is not distinct from w.database and l.relation is not distinct from w.relation
      and l.page is not distinct from w.page and l.tuple is not distinct from w.tuple
      and l.virtualxid is not distinct from w.virtualxid and l.transactionid is not distinct from w.transactionid
      and l.classid is not distinct from w.classid and l.objid is not distinct from w.objid
      and l.objsubid is not distinct from w.objsubid
)
select a.pid, a.state = 'active' as active
from pg_stat_activity a
where a.pid <> pg_backend_pid()
  and a.backend_type in ('client backend', 'parallel worker')
  and (
    a.pid in (select pid from holders)
    or exists (select from startup where wait_event in
      ('RecoveryConflictSnapshot', 'RecoveryConflictTablespace', 'BufferPin'))
      and (a.backend_xmin is not null or a.state = 'active')
  );
