-- Running values of the settings that change by reload, as a session that has just begun sees them.
-- Role: pg_read_all_settings (pg_monitor). Versions: 14 to 18. Columns: as named below.
select
  pg_is_in_recovery() as in_recovery,
  current_setting('primary_conninfo') as conninfo,
  current_setting('primary_slot_name') as slot,
  current_setting('restore_command') as restore_command,
  current_setting('recovery_min_apply_delay') as apply_delay,
  current_setting('recovery_target_timeline') as target_timeline,
  current_setting('synchronous_standby_names') as rule,
  current_setting('max_standby_streaming_delay') as streaming_delay;
