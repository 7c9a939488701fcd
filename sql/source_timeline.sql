-- Timeline in the control file of the server that a rewind copies from: pg_rewind goes by it.
-- Role: any. Versions: 14 to 18. Columns: timeline, in_recovery.
select timeline_id as timeline, pg_is_in_recovery() as in_recovery from pg_control_checkpoint();
