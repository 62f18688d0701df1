package join_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/join"
)

const token = "c0ffee00-1234-4abc-8def-0123456789ab"

func example() join.String {
	return join.String{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"),
		Server:      "hallmark.example.org:8081",
		Roots:       []join.Root{sha256.Sum256([]byte("one")), sha256.Sum256([]byte("two"))},
		Token:       token,
	}
}

func encode(tb testing.TB, s join.String) string {
	tb.Helper()
	text, err := s.Encode()
	if err != nil {
		tb.Fatal(err)
	}
	return text
}

func TestAJoinStringComesBackAsItWas(t *testing.T) {
	largest := example()
	largest.TrustDomain = spiffeid.RequireTrustDomainFromString(strings.Repeat("a", join.MaxTrustDomain))
	largest.Server = strings.Repeat("h", join.MaxServer-len(":65535")) + ":65535"
	largest.Token = strings.Repeat("t", join.MaxToken)
	for i := range join.MaxRoots - 2 {
		largest.Roots = append(largest.Roots, join.Root{byte(i)})
	}
	v6 := example()
	v6.Server = "[2001:db8::1]:443"

	for _, want := range []join.String{example(), largest, v6} {
		text := encode(t, want)
		if len(text) > join.MaxLength {
			t.Errorf("%d characters, more than the most, %d", len(text), join.MaxLength)
		}
		got, err := join.Parse(" \n" + text + "\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(*got, want) {
			t.Errorf("got %v, want %v", *got, want)
		}
	}
}

func TestAJoinStringNeedsNoQuoting(t *testing.T) {
	for _, r := range encode(t, example()) {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.", r) {
			t.Errorf("it contains %q", r)
		}
	}
}

func TestEveryCutOfAJoinStringIsCalledIncomplete(t *testing.T) {
	text := encode(t, example())
	for n := 1; n < len(text); n++ {
		if _, err := join.Parse(text[:n]); !errors.Is(err, join.ErrIncomplete) {
			t.Fatalf("cut after %d of %d characters: %v", n, len(text), err)
		}
	}
}

func TestEveryChangedCharacterIsNoticed(t *testing.T) {
	text := encode(t, example())
	for i := range text {
		for _, c := range []byte("Aa1-_.=+/ \x00\xff") {
			if text[i] == c {
				continue
			}
			changed := []byte(text)
			changed[i] = c
			if got, err := join.Parse(string(changed)); err == nil {
				t.Fatalf("character %d changed to %q gives %v", i, c, got)
			}
		}
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	text := encode(t, example())
	damaged := []byte(text)
	damaged[len(damaged)/2] ^= 1
	for name, c := range map[string]struct{ in, want string }{
		"nothing":           {"", "is empty"},
		"something else":    {token, `does not begin with "hallmark-join-v1."`},
		"another version":   {strings.Replace(text, "v1.", "v2.", 1), `does not begin with "hallmark-join-v1."`},
		"too much":          {text + "AAAA", "goes on after its end"},
		"one too much":      {text + "A", "goes on after its end"},
		"too long":          {join.Prefix + strings.Repeat("A", join.MaxLength), "the most is 2048"},
		"broken over lines": {text[:40] + "\n" + text[40:], "white space"},
		"damaged":           {string(damaged), "damaged"},
		"no length":         {join.Prefix + "AAAA", "damaged"},
	} {
		if _, err := join.Parse(c.in); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want it to contain %q", name, err, c.want)
		}
	}
}

func TestEncodeRefusesWhatCannotWork(t *testing.T) {
	for want, change := range map[string]func(*join.String){
		"missing trust domain":         func(s *join.String) { s.TrustDomain = spiffeid.TrustDomain{} },
		"is not host:port":             func(s *join.String) { s.Server = "example.org" },
		"no port between 1 and 65535":  func(s *join.String) { s.Server = "example.org:0" },
		`"0.0.0.0:8081" is none`:       func(s *join.String) { s.Server = "0.0.0.0:8081" },
		`"[::]:8081" is none`:          func(s *join.String) { s.Server = "[::]:8081" },
		`set "advertise" in the serve`: func(s *join.String) { s.Server = ":8081" },
		"address is 309 bytes":         func(s *join.String) { s.Server = strings.Repeat("a", 304) + ":8081" },
		`contains ' '`:                 func(s *join.String) { s.Server = "a b:8081" },
		"has 0 roots":                  func(s *join.String) { s.Roots = nil },
		"has 9 roots":                  func(s *join.String) { s.Roots = make([]join.Root, 9) },
		"named twice":                  func(s *join.String) { s.Roots = make([]join.Root, 2) },
		"token is 0 bytes":             func(s *join.String) { s.Token = "" },
		"token is 256 bytes":           func(s *join.String) { s.Token = strings.Repeat("t", 256) },
		"token contains other":         func(s *join.String) { s.Token = "a/b" },
	} {
		s := example()
		change(&s)
		if _, err := s.Encode(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want it to contain %q", err, want)
		} else if s.Token != "" && strings.Contains(err.Error(), s.Token) {
			t.Errorf("the error holds the token: %v", err)
		}
	}
}

func TestTheTokenIsNotShownOrLogged(t *testing.T) {
	s := example()
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "value", s, "pointer", &s)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "value", s, "pointer", &s)
	shown := fmt.Sprint(s, &s) + fmt.Sprintf("%v %+v %#v %s %#v", s, s, s, s, &s) + log.String()
	if strings.Contains(shown, token) {
		t.Errorf("the token is shown: %s", shown)
	}
	if !strings.Contains(shown, "hallmark.example.org:8081") || !json.Valid(bytes.SplitN(log.Bytes(), []byte("\n"), 2)[0]) {
		t.Errorf("nothing useful is shown: %s", shown)
	}
}

func TestPinsTellsTheRootsFromOthers(t *testing.T) {
	s := example()
	if !s.Pins(&x509.Certificate{Raw: []byte("two")}) {
		t.Error("a root is not pinned")
	}
	if s.Pins(&x509.Certificate{Raw: []byte("three")}) {
		t.Error("another certificate is pinned")
	}
}

func FuzzParse(f *testing.F) {
	s := example()
	text := encode(f, s)
	f.Add(text)
	f.Add(text[:50])
	f.Add(join.Prefix)
	f.Add(join.Prefix + base64.RawURLEncoding.EncodeToString(make([]byte, 64)))
	f.Fuzz(func(t *testing.T, in string) {
		got, err := join.Parse(in)
		if err != nil {
			return
		}
		again, err := got.Encode()
		if err != nil {
			t.Fatalf("what was parsed cannot be encoded: %v", err)
		}
		if again != strings.TrimSpace(in) {
			t.Fatalf("two forms of one value:\n%s\n%s", in, again)
		}
	})
}

// The checksum keeps a fuzzer from the parts; this target computes it.
func FuzzParseBody(f *testing.F) {
	s := example()
	raw, err := base64.RawURLEncoding.DecodeString(encode(f, s)[len(join.Prefix):])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw[2 : len(raw)-8])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(body) > 1400 {
			return
		}
		b := append([]byte{byte((len(body) + 8) >> 8), byte(len(body) + 8)}, body...)
		sum := sha256.Sum256(append([]byte(join.Prefix), b...))
		in := join.Prefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:8]...))
		got, err := join.Parse(in)
		if errors.Is(err, join.ErrIncomplete) || errors.Is(err, join.ErrDamaged) {
			t.Fatalf("a whole string is called %v", err)
		}
		if err != nil {
			return
		}
		if again, err := got.Encode(); err != nil || again != in {
			t.Fatalf("two forms of one value:\n%s\n%s (%v)", in, again, err)
		}
	})
}
