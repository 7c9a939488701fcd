-- Roles that may log in through the endpoint, with what proves their passwords.
-- Role: pgvigil_endpoint. Versions: 14 to 18. Columns: as the function's (sql/roles_endpoint.sql).
select name, stored, valid_until_ms, can_login, superuser from pgvigil.login_roles()
