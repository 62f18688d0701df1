package digest_test

import (
	"crypto/sha256"
	"fmt"
	"math/big"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/digest"
)

type member struct {
	bundle   bool
	name     string
	revision int64
	created  int64
}

func (m member) add(s *digest.Sum) {
	if m.bundle {
		s.AddBundle(m.name, uint64(m.revision))
	} else {
		s.AddEntry(m.name, m.revision, m.created)
	}
}

func (m member) sub(s *digest.Sum) {
	if m.bundle {
		s.SubBundle(m.name, uint64(m.revision))
	} else {
		s.SubEntry(m.name, m.revision, m.created)
	}
}

// number computes what the definition says, with numbers of any size.
func (m member) number() *big.Int {
	text := fmt.Sprintf("entry\x00%s\x00%d\x00%d", m.name, m.revision, m.created)
	if m.bundle {
		text = fmt.Sprintf("bundle\x00%s\x00%d", m.name, uint64(m.revision))
	}
	h := sha256.Sum256([]byte(text))
	b := h[:digest.Size]
	slices.Reverse(b)
	return new(big.Int).SetBytes(b)
}

func members(n int) []member {
	r := rand.New(rand.NewPCG(1, 2))
	out := make([]member, n)
	for i := range out {
		out[i] = member{bundle: r.IntN(2) == 0, name: fmt.Sprint("m", i), revision: r.Int64(), created: r.Int64()}
	}
	return out
}

func TestSumIsTheSumOfTheMembersHashes(t *testing.T) {
	var got digest.Sum
	want := new(big.Int)
	modulus := new(big.Int).Lsh(big.NewInt(1), 128)
	for _, m := range members(300) {
		m.add(&got)
		want.Add(want, m.number()).Mod(want, modulus)
		bytes := want.FillBytes(make([]byte, digest.Size))
		slices.Reverse(bytes)
		if !slices.Equal(got[:], bytes) {
			t.Fatalf("after %v: sum %v, want %x", m, got, bytes)
		}
	}
}

// The form is a contract between versions of server and agent.
func TestSumOfAKnownSetIsFixed(t *testing.T) {
	var s digest.Sum
	s.AddEntry("a", 0, 1700000000)
	s.AddEntry("b", 7, -1)
	s.AddBundle("example.org", 1<<63)
	if got, want := s.String(), "d0477849267a214601ea60187a604e51"; got != want {
		t.Errorf("sum %s, want %s", got, want)
	}
}

func TestSumDoesNotDependOnOrder(t *testing.T) {
	all := members(200)
	var a, b digest.Sum
	for _, m := range all {
		m.add(&a)
	}
	rand.New(rand.NewPCG(3, 4)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, m := range all {
		m.add(&b)
	}
	if a != b {
		t.Errorf("sums differ: %v and %v", a, b)
	}
}

func TestTakingEveryMemberOutLeavesTheEmptySum(t *testing.T) {
	all := members(200)
	var s digest.Sum
	for _, m := range all {
		m.add(&s)
	}
	for _, m := range all {
		m.sub(&s)
	}
	if s != (digest.Sum{}) {
		t.Errorf("sum %v, want zero", s)
	}
}

func TestEveryPartOfAMemberCounts(t *testing.T) {
	sums := map[digest.Sum]string{{}: "the empty set"}
	check := func(what string, f func(*digest.Sum)) {
		t.Helper()
		var s digest.Sum
		f(&s)
		if same, ok := sums[s]; ok {
			t.Errorf("%s has the sum of %s", what, same)
		}
		sums[s] = what
	}
	check("entry", func(s *digest.Sum) { s.AddEntry("a", 1, 2) })
	check("another ID", func(s *digest.Sum) { s.AddEntry("b", 1, 2) })
	check("another revision", func(s *digest.Sum) { s.AddEntry("a", 2, 2) })
	check("another time", func(s *digest.Sum) { s.AddEntry("a", 1, 3) })
	check("twice", func(s *digest.Sum) { s.AddEntry("a", 1, 2); s.AddEntry("a", 1, 2) })
	check("bundle", func(s *digest.Sum) { s.AddBundle("a", 1) })
	check("another sequence", func(s *digest.Sum) { s.AddBundle("a", 2) })
	check("another name", func(s *digest.Sum) { s.AddBundle("b", 1) })
}

func BenchmarkAddEntry(b *testing.B) {
	var s digest.Sum
	for b.Loop() {
		s.AddEntry("6b7f9c0e-2d7c-4f0c-9a3d-0e6b5f5f1d11", 12, 1700000000)
	}
}
