-- What the running server is and how far it has come.
-- Role: pg_monitor. Versions: 14 to 18. Columns: as named below; positions are null where they make no sense.
select
  current_setting('server_version_num') as version,
  pg_is_in_recovery() as in_recovery,
  case when pg_is_in_recovery() then null else pg_current_wal_flush_lsn() end as flushed,
  case when pg_is_in_recovery() then null else substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) end as timeline_hex,
  pg_last_wal_replay_lsn() as replayed,
  pg_last_wal_receive_lsn() as received,
  case when pg_is_in_recovery() then pg_get_wal_replay_pause_state() <> 'not paused' else false end as replay_paused,
  (extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp()) * 1000)::bigint as replay_delay_ms,
  current_setting('primary_conninfo') as conninfo,
  current_setting('primary_slot_name') as slot,
  current_setting('synchronous_standby_names') as rule,
  current_setting('max_slot_wal_keep_size') as slot_bound,
  current_setting('default_transaction_read_only') = 'off' as writable,
  exists (select from pg_stat_activity where backend_type = 'walreceiver') as receiver_runs,
  coalesce(r.status = 'streaming', false) as receiver_streams,
  (extract(epoch from r.last_msg_receipt_time) * 1000000)::bigint as last_message_mark,
  (extract(epoch from clock_timestamp() - r.last_msg_receipt_time) * 1000)::bigint as last_message_age_ms
from (select) as this left join pg_stat_wal_receiver r on true;
