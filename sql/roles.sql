-- pgvigil's roles with the least rights that their work needs. Rights on functions are for the database `postgres`.
-- Role: superuser. Versions: 14 to 18. Columns: none.
do $$
declare
  name text;
begin
  foreach name in array array['pgvigil', 'pgvigil_replication', 'pgvigil_rewind'] loop
    if not exists (select from pg_catalog.pg_roles where rolname = name) then
      execute pg_catalog.format('create role %I', name);
    end if;
  end loop;
end
$$;
alter role pgvigil with login replication nosuperuser nocreatedb nocreaterole inherit password '<verifier of pgvigil>';
alter role pgvigil_replication with login replication nosuperuser nocreatedb nocreaterole password '<verifier of pgvigil_replication>';
alter role pgvigil_rewind with login noreplication nosuperuser nocreatedb nocreaterole password '<verifier of pgvigil_rewind>';
grant pg_monitor to pgvigil;
grant execute on function pg_catalog.pg_reload_conf() to pgvigil;
grant execute on function pg_catalog.pg_promote(boolean, integer) to pgvigil;
grant execute on function pg_catalog.pg_wal_replay_pause() to pgvigil;
grant execute on function pg_catalog.pg_wal_replay_resume() to pgvigil;
grant execute on function pg_catalog.pg_ls_dir(text, boolean, boolean) to pgvigil_rewind;
grant execute on function pg_catalog.pg_stat_file(text, boolean) to pgvigil_rewind;
grant execute on function pg_catalog.pg_read_binary_file(text) to pgvigil_rewind;
grant execute on function pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean) to pgvigil_rewind;
