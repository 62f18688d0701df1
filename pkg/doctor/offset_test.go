package doctor

import (
	"math/rand/v2"
	"testing"
	"time"
)

func TestTheBoundsOfTheClocksOffsetHoldWhateverTheNetworkDoes(t *testing.T) {
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for range 10_000 {
		ahead := time.Duration(rand.Int64N(int64(20*time.Second))) - 10*time.Second
		there := time.Duration(rand.Int64N(int64(time.Second)))
		back := time.Duration(rand.Int64N(int64(time.Second)))
		sent := start.Add(time.Duration(rand.Int64N(int64(time.Second))))
		date := sent.Add(there + ahead).Truncate(time.Second)
		low, high := offset(sent, sent.Add(there+back), date)
		if ahead < low || ahead > high {
			t.Fatalf("%v is not between %v and %v (%v there, %v back)", ahead, low, high, there, back)
		}
	}
}
