-- What the endpoint may know: a role that can do nothing but call one function, and that function, which is the only way from
-- it to pg_authid. pgvigil's own roles are left out: nobody logs in as one of them through the endpoint.
-- In the database `postgres`. Role: superuser. Versions: 14 to 18. Columns: none.
do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'pgvigil_endpoint') then
    create role pgvigil_endpoint;
  end if;
end
$$;
alter role pgvigil_endpoint with login noreplication nosuperuser nocreatedb nocreaterole noinherit connection limit 4 password '<verifier of pgvigil_endpoint>';
create schema if not exists pgvigil;
revoke all on schema pgvigil from public;
grant usage on schema pgvigil to pgvigil_endpoint;
create or replace function pgvigil.login_roles()
  returns table (name text, stored text, valid_until_ms bigint, can_login boolean, superuser boolean)
  language sql stable security definer
  set search_path = pg_catalog, pg_temp
as $$
  select
    rolname::text,
    rolpassword::text,
    case
      when rolvaliduntil is null or rolvaliduntil = 'infinity' then null
      when rolvaliduntil = '-infinity' then 0
      else (extract(epoch from rolvaliduntil) * 1000)::bigint
    end,
    rolcanlogin,
    rolsuper
  from pg_catalog.pg_authid
  where (rolcanlogin or rolpassword is not null) and rolname::text not in ('pgvigil', 'pgvigil_replication', 'pgvigil_rewind', 'pgvigil_endpoint')
$$;
revoke all on function pgvigil.login_roles() from public;
grant execute on function pgvigil.login_roles() to pgvigil_endpoint;
