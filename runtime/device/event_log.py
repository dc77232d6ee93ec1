"""The log that a device's books write: every storage that comes and goes, in order, with phase and category."""

from __future__ import annotations

from dataclasses import dataclass, field

from meft.planner.records.plan import Phase
from meft.planner.simulation.stream import Stream, StreamEvent


@dataclass
class EventLog:
    """Events in the making. ``phase`` is what the program is in now; whoever runs the program sets it."""

    phase: Phase = "resident"
    _events: list[StreamEvent] = field(default_factory=list)
    _moments: dict[str, int] = field(default_factory=dict)
    _index_of: dict[int, int] = field(default_factory=dict)

    def allocated(self, num_bytes: int, category: str, label: str) -> int:
        """A tensor comes; returns its number."""
        number = len(self._index_of)
        self._index_of[number] = len(self._events)
        self._events.append(StreamEvent(number, num_bytes, self.phase, category, label))
        return number

    def released(self, number: int) -> None:
        """A tensor goes."""
        came = self._events[self._index_of[number]]
        self._events.append(StreamEvent(number, -came.num_bytes, self.phase, came.category, came.label))

    def recategorise(self, number: int, category: str) -> None:
        """It has turned out what a tensor is."""
        index = self._index_of[number]
        self._events[index] = self._events[index]._replace(category=category)

    def moment(self, name: str) -> None:
        """Name this place in the stream."""
        self._moments[name] = len(self._events)

    def stream(self) -> Stream:
        """Everything up to the last moment; what is there then never goes."""
        end = max(self._moments.values(), default=len(self._events))
        events = (event._replace(category=self._category(event)) for event in self._events[:end])
        return Stream(tuple(events), dict(self._moments))

    def _category(self, event: StreamEvent) -> str:
        return self._events[self._index_of[event.tensor]].category
