package plugin

import "time"

// Hurry has a plugin started again at once, and ended without much waiting.
func (s *supervisor) Hurry() {
	s.times.firstDelay, s.times.longestDelay = 50*time.Millisecond, time.Second
	s.times.stop = 500 * time.Millisecond
}

// Impatient gives a plugin little time for an answer, too.
func (s *supervisor) Impatient() {
	s.Hurry()
	s.times.call, s.times.step = 400*time.Millisecond, 400*time.Millisecond
}

// ImpatientAtStart gives a plugin little time to start.
func (s *supervisor) ImpatientAtStart() {
	s.Hurry()
	s.times.start = time.Second
}
