-- Where replay stands: the startup process, receivers of WAL (pg_stat_wal_receiver hides one that is connecting), positions.
-- Role: pg_monitor. Versions: 14 to 18. Columns: as named below.
select
  pg_is_in_recovery() as in_recovery,
  case when pg_is_in_recovery() then pg_get_wal_replay_pause_state() else '' end as pause_state,
  coalesce((select wait_event from pg_stat_activity where backend_type = 'startup'), '') as wait_event,
  (select max(pid) from pg_stat_activity where backend_type = 'walreceiver') as receiver_pid,
  pg_last_wal_replay_lsn() as replayed,
  pg_last_wal_receive_lsn() as received;
