"""The demo's order service: an application like any other, that uses SQLAlchemy and knows nothing of the relay.

It remembers by itself what it committed and what it rolled back, so that nothing else need be believed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import ForeignKey
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox_relay import outbox
from outbox_relay.outbox import Message

CUSTOMERS = 20
#: One order in so many is rolled back.
ROLLED_BACK_SHARE = 10


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    name: Mapped[str] = mapped_column(primary_key=True)
    orders: Mapped[int]


class Order(Base):
    __tablename__ = "customer_order"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    customer: Mapped[str] = mapped_column(ForeignKey("customer.name"))
    of_customer: Mapped[int]


class PaymentRefusedError(Exception):
    """Why an order is rolled back."""


class OrderService:
    """Places orders in a database that has the outbox schema. SQLAlchemy's and asyncpg's errors come as they are."""

    def __init__(self, database_url: str, topic: str, *, connections: int, **connect: Any) -> None:
        """``connections`` are the most that it opens; ``connect`` is for each of them, as asyncpg takes it."""
        self._topic = topic
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            # asyncpg reads the url, as it does for the relay: SQLAlchemy would take fewer kinds.
            async_creator=partial(asyncpg.connect, database_url, **connect),
            pool_size=connections,
            max_overflow=0,
        )
        self._sessions = async_sessionmaker(self._engine)
        #: Event ids, in the text form that consumers see.
        self.committed: set[str] = set()
        self.rolled_back: set[str] = set()

    @property
    def placed(self) -> int:
        """How many orders have come so far, rolled back or not."""
        return len(self.committed) + len(self.rolled_back)

    async def prepare(self) -> None:
        """Make its tables and its customers."""
        async with self._engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with self._sessions.begin() as session:
            session.add_all(Customer(name=f"customer-{n}", orders=0) for n in range(CUSTOMERS))

    async def place(self, number: int) -> None:
        """Write one order and its message, then commit or roll back both. Several may be placed at once."""
        # Two orders in a row are one customer's, so that those who write them meet.
        name = f"customer-{number // 2 % CUSTOMERS}"
        try:
            async with self._sessions.begin() as session:
                # Locked before the message is added: this is what puts a customer's messages in order.
                customer = await session.get_one(Customer, name, with_for_update=True)
                customer.orders += 1
                session.add(Order(number=number, customer=name, of_customer=customer.orders))
                await session.flush()
                placed = {"order": number, "customer": name, "of_customer": customer.orders}
                message = Message(self._topic, placed, key=name, type="OrderPlaced")
                await outbox.add_async(session, message)
                if number % ROLLED_BACK_SHARE == 0:
                    raise PaymentRefusedError
        except PaymentRefusedError:
            self.rolled_back.add(str(message.event_id))
        else:
            self.committed.add(str(message.event_id))

    async def close(self) -> None:
        """Close its connections."""
        await self._engine.dispose()
