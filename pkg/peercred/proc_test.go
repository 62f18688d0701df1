package peercred

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestStatusIsWhatTheKernelSaysOfThisProcess(t *testing.T) {
	s, err := ReadStatus(int32(os.Getpid()))
	must(t, err)
	groups, err := os.Getgroups()
	must(t, err)
	if s.EffectiveUID() != uint32(os.Geteuid()) || s.UIDs[0] != uint32(os.Getuid()) ||
		s.EffectiveGID() != uint32(os.Getegid()) || s.GIDs[0] != uint32(os.Getgid()) {
		t.Errorf("got %+v", s)
	}
	for _, g := range groups {
		if !slices.Contains(s.Groups, uint32(g)) {
			t.Errorf("group %d is missing of %v", g, s.Groups)
		}
	}
}

func TestTheCommandNameCannotForgeTheStartTime(t *testing.T) {
	for _, name := range []string{"a", "a b", "a) R 1 1 1", ")", "((", "x) Z 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 77 ("} {
		line := "12 (" + name + ") S 1 12 12 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 424242 1000 50 18446744073709551615\n"
		s, err := parseStat([]byte(line))
		must(t, err)
		if s.start != 424242 || s.state != 'S' {
			t.Errorf("%q: got %+v", name, s)
		}
	}
}

func TestABrokenStatIsRefused(t *testing.T) {
	for _, line := range []string{"", "1", "1 (a", "1 (a)", "1 (a) S 1 2", "1 (a) SS", "1 a) S", "1 (a) S 1 12 12 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 x"} {
		if s, err := parseStat([]byte(line)); err == nil {
			t.Errorf("%q gave %+v", line, s)
		}
	}
}

const goodStatus = "Name:\tx\nTracerPid:\t77\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n"

func TestAProcessOfAnotherPIDNamespaceIsTold(t *testing.T) {
	for line, want := range map[string]bool{"": false, "NSpid:\t7\n": false, "NSpid:\t4711\t7\n": true, "NSpid:\t4711\t7\t1\n": true} {
		s, err := parseStatus([]byte(goodStatus + line))
		must(t, err)
		if s.Nested != want {
			t.Errorf("%q: nested is %v", line, s.Nested)
		}
	}
}

func TestABrokenStatusIsRefused(t *testing.T) {
	s, err := parseStatus([]byte(goodStatus))
	must(t, err)
	if s.EffectiveUID() != 2 || s.EffectiveGID() != 6 || !slices.Equal(s.Groups, []uint32{9, 10}) {
		t.Errorf("got %+v", s)
	}
	for _, change := range [][2]string{
		{"1\t2\t3\t4", "1\t2\t3"}, {"1\t2\t3\t4", "1\t2\t3\t4\t5"}, {"\t2", "\t-2"}, {"\t6", "\t4294967296"},
		{"9 10", "9 x"}, {"Groups", "groups"}, {"Uid", "uid"}, {"Gid", "gid"},
	} {
		if s, err := parseStatus([]byte(strings.Replace(goodStatus, change[0], change[1], 1))); err == nil {
			t.Errorf("%q: got %+v", change, s)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (a b) S 1 12 12 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 424242 1000\n"))
	f.Add([]byte("1 ()) Z"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStat(b); err == nil && s.state == 0 {
			t.Error("no state and no error")
		}
	})
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(goodStatus))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStatus(b); err != nil && (s.UIDs != [4]uint32{} || s.Groups != nil) {
			t.Error("values and an error")
		}
	})
}

func FuzzParseDiagPeer(f *testing.F) {
	f.Add(diagRequest(7))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := parseDiagPeer(b); err != nil && n != 0 {
			t.Error("an inode and an error")
		}
	})
}
