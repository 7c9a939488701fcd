-- A query cancelled while it waits for standbys looks like success to its client, so nobody cancels by SQL.
-- Role: superuser, once in each database. Versions: 14 to 18. Columns: none.
revoke execute on function pg_catalog.pg_cancel_backend(integer) from public;
