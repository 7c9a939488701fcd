-- The agent gets in when clients have filled the server.
-- Role: superuser. Versions: 16 to 18 (before, the agent comes in as superuser then). Columns: none.
grant pg_use_reserved_connections to pgvigil;
