"""Times: the same moment is the same number, whichever database and column it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from harness.mariadb_server import MariaDbServer
from harness.postgres_server import PostgresServer

from trading_push import ConfigurationError, SourceError, SqlSource
from trading_push.protocol.payloads import encode_data
from trading_push.settings.sources import Database, Query

READ = Query("SELECT * FROM moments WHERE user_id IN :user_ids", single=True)
SHANGHAI = timezone(timedelta(hours=8))
NOON = datetime(2025, 11, 20, 12, 0, 0, 123_999, tzinfo=SHANGHAI)
NOON_MS = 1_763_611_200_123


@pytest.fixture(scope="module")
def postgresql(postgres: PostgresServer) -> Iterator[str]:
    postgres.create_database(
        "moments",
        """
        CREATE TABLE moments (user_id text, aware timestamptz, naive timestamp, day date,
                              naives timestamp[], hour time);
        SET TimeZone = 'Asia/Shanghai';
        INSERT INTO moments VALUES
            ('4', '2025-11-20 12:00:00.123999', '2025-11-20 12:00:00.123999', '2025-11-20',
             '{2025-11-20 12:00:00.123999}', '08:30:00'),
            ('5', '2025-11-20 12:00:00.1239999', '1969-12-31 23:59:59.9999', '0099-01-01', NULL,
             NULL);
        """,
    )
    yield postgres.url("moments")
    postgres.admin("DROP DATABASE moments WITH (FORCE)")


async def read(url: str, user: str, **options: Any) -> Any:
    source = SqlSource(url, {"balance": READ}, **options)
    try:
        return msgspec.json.decode(await source.fetch(user, "balance"))
    finally:
        source.close()


async def test_times_of_postgresql(postgresql: str) -> None:
    for zone, later in (
        ("UTC", 8 * 3_600_000),
        ("Asia/Shanghai", 0),
        ("Europe/Berlin", 25_200_000),
    ):
        assert await read(postgresql, "4", time_zone=zone) == {
            "aware": NOON_MS,
            "naive": NOON_MS + later,
            "day": "2025-11-20",
            "naives": [NOON_MS + later],
            "hour": "08:30:00",
        }
    found = await read(postgresql, "5")
    assert found["aware"] == NOON_MS + 1
    assert found["naive"] == -1  # rounded down, before the epoch too
    assert found["day"] == "0099-01-01"


async def test_a_moment_is_the_same_number_by_a_function(postgresql: str) -> None:
    found = await read(postgresql, "4", time_zone="Asia/Shanghai")
    for moment in (NOON, NOON.astimezone(UTC), NOON.astimezone(UTC).replace(tzinfo=None)):
        assert msgspec.json.decode(encode_data({"at": moment})) == {"at": found["aware"]}
    assert found["naive"] == found["aware"]


async def test_times_of_mariadb(mariadb: MariaDbServer) -> None:
    mariadb.create_database(
        "moments",
        "CREATE TABLE moments (user_id varchar(9), stamp timestamp(6) NULL, moment datetime(6), "
        "day date, hour time)",
        # By a session 8 hours ahead, as the server is.
        "INSERT INTO moments VALUES ('4', '2025-11-20 12:00:00.123999', "
        "'2025-11-20 12:00:00.123999', '2025-11-20', '08:30:00')",
    )
    for zone, later in (("UTC", 8 * 3_600_000), ("Asia/Shanghai", 0)):
        assert await read(mariadb.url("moments"), "4", time_zone=zone) == {
            "stamp": NOON_MS,
            "moment": NOON_MS + later,
            "day": "2025-11-20",
            "hour": "PT30600S",
        }


async def test_a_date_of_mysql_that_there_is_not_is_an_error_of_its_user(
    mariadb: MariaDbServer,
) -> None:
    mariadb.create_database("zero", "CREATE TABLE moments (user_id int, at datetime, day date)")
    mariadb.admin(
        "SET STATEMENT sql_mode = '' FOR INSERT INTO moments VALUES (4, 0, '2025-11-20'), "
        "(5, '2025-11-20', '2025-00-20'), (6, '9999-12-31 23:59:59', '1000-01-01')",
        "zero",
    )
    url = mariadb.url("zero")
    for columns, bad in (("at, day", ["4", "5"]), ("NULLIF(at, 0) AS at, NULL AS day", [])):
        sql = f"SELECT user_id, {columns} FROM moments WHERE user_id IN :user_ids"
        source = SqlSource(url, {"moments": Query(sql)})
        found = await source.fetch_many(["4", "5", "6"], "moments")
        source.close()
        errors = {user: str(each) for user, each in found.items() if isinstance(each, SourceError)}
        assert list(errors) == bad
        assert all("a date that there is not" in each for each in errors.values())
        (last,) = msgspec.json.decode(found["6"])
        assert last["at"] == 253_402_300_799_000


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
async def test_the_last_moment_of_the_last_year(
    postgres: PostgresServer, driver: str, postgresql: str
) -> None:
    if driver == "psycopg2":
        pytest.importorskip("psycopg2")
    url = postgresql.replace("+psycopg:", f"+{driver}:")
    last = "timestamp '9999-12-31 23:59:59.999999'"
    sql = f"SELECT user_id, {last} AS at FROM moments WHERE user_id IN :user_ids"
    source = SqlSource(url, {"moments": Query(sql)})
    try:
        found = (await source.fetch_many(["4"], "moments"))["4"]
    finally:
        source.close()
    if driver == "psycopg2":  # which has the same for infinity
        assert "infinity" in str(found)
    else:
        assert msgspec.json.decode(found)[0] == {"at": 253_402_300_799_999}


@pytest.mark.parametrize("name", ["Shanghai", "../UTC", "", "Asia", "/etc/localtime", "x\0"])
def test_a_time_zone_that_there_is_not(name: str) -> None:
    with pytest.raises(ConfigurationError, match="like Asia/Shanghai"):
        Database(time_zone=name)
    with pytest.raises(ConfigurationError, match="like Asia/Shanghai"):
        SqlSource("sqlite:////x.db", {}, time_zone=name)
