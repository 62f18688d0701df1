package statuslist_test

import (
	"bytes"
	"compress/zlib"
	"encoding/base64"
	"encoding/json"
	"math"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
)

// The test vectors of draft-ietf-oauth-status-list, "Test vectors for Status List
// encoding": lists of 2^20 tokens, and the two examples of §4.
var vectors = []struct {
	name   string
	bits   int
	tokens int
	lst    string
	set    map[int]statuslist.Status
}{
	{"example of 1 bit", 1, 16, "eNrbuRgAAhcBXQ", map[int]statuslist.Status{0: 1, 3: 1, 4: 1, 5: 1, 7: 1, 8: 1, 9: 1, 13: 1, 15: 1}},
	{"example of 2 bits", 2, 12, "eNo76fITAAPfAgc", map[int]statuslist.Status{0: 1, 1: 2, 3: 3, 5: 1, 7: 1, 8: 1, 9: 2, 10: 3, 11: 3}},
	{"1 bit", 1, 1 << 20, "eNrt3AENwCAMAEGogklACtKQPg9LugC9k_ACvreiogE" +
		"AAKkeCQAAAAAAAAAAAAAAAAAAAIBylgQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" +
		"AAAAAAAAAAAAAAAAAAAXG9IAAAAAAAAAPwsJAAAAAAAAAAAAAAAvhsSAAAAAAAAAAA" +
		"A7KpLAAAAAAAAAAAAAAAAAAAAAJsLCQAAAAAAAAAAADjelAAAAAAAAAAAKjDMAQAAA" +
		"ACAZC8L2AEb", map[int]statuslist.Status{0: 1, 1993: 1, 25460: 1, 159495: 1, 495669: 1, 554353: 1, 645645: 1, 723232: 1, 854545: 1, 934534: 1, 1000345: 1}},
	{"2 bits", 2, 1 << 20, "eNrt2zENACEQAEEuoaBABP5VIO01fCjIHTMStt9ovGV" +
		"IAAAAAABAbiEBAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEB5WwIAAAAAA" +
		"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" +
		"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAID0ugQAAAAAAAAAAAAAAAAAQG12SgAAA" +
		"AAAAAAAAAAAAAAAAAAAAAAAAOCSIQEAAAAAAAAAAAAAAAAAAAAAAAD8ExIAAAAAAAA" +
		"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAwJEuAQAAAAAAAAAAAAAAAAAAAAAAAMB9S" +
		"wIAAAAAAAAAAAAAAAAAAACoYUoAAAAAAAAAAAAAAEBqH81gAQw", map[int]statuslist.Status{
		0: 1, 1993: 2, 25460: 1, 159495: 3, 495669: 1, 554353: 1, 645645: 2, 723232: 1, 854545: 1, 934534: 2, 1000345: 3}},
}

func decoded(t testing.TB, lst string) []byte {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(lst)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStatusList_SL02_SL07_TheDraftsTestVectors(t *testing.T) {
	for _, v := range vectors {
		t.Run(v.name, func(t *testing.T) {
			list, err := statuslist.Decompress(v.bits, decoded(t, v.lst))
			if err != nil {
				t.Fatal(err)
			}
			if list.Len() != v.tokens || list.Bits() != v.bits || list.Count() != len(v.set) {
				t.Errorf("it is of %d tokens with %d bits, of which %d are not valid; want %d, %d and %d", list.Len(), list.Bits(), list.Count(), v.tokens, v.bits, len(v.set))
			}
			made, err := statuslist.New(v.bits, v.tokens)
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range v.set {
				if got, ok := list.Status(i); !ok || got != want {
					t.Errorf("status[%d] is %d, want %d", i, got, want)
				}
				made.Set(i, want)
			}
			again, err := statuslist.Decompress(v.bits, made.Compress())
			if err != nil || !bytes.Equal(raw(t, made.Compress()), raw(t, decoded(t, v.lst))) || again.Count() != len(v.set) {
				t.Errorf("a list made of the same statuses is another: %v", err)
			}
		})
	}
}

// raw undoes zlib, by the standard library alone.
func raw(t *testing.T, compressed []byte) []byte {
	t.Helper()
	z, err := zlib.NewReader(bytes.NewReader(compressed))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := b.ReadFrom(z); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func deflated(data []byte) []byte {
	var b bytes.Buffer
	z := zlib.NewWriter(&b)
	_, _ = z.Write(data) // to memory
	z.Close()
	return b.Bytes()
}

func TestStatusList_SL02_WhatIsNoListIsRefused(t *testing.T) {
	good := deflated([]byte{1, 2})
	for name, c := range map[string]struct {
		bits int
		data []byte
	}{
		"bits 0":            {0, good},
		"bits 3":            {3, good},
		"bits 16":           {16, good},
		"nothing":           {1, nil},
		"no zlib":           {1, []byte("not compressed at all")},
		"deflate bare":      {1, good[2:]},
		"torn":              {1, good[:len(good)-3]},
		"a wrong sum":       {1, append(bytes.Clone(good[:len(good)-1]), good[len(good)-1]^1)},
		"more after it":     {1, append(bytes.Clone(good), 0)},
		"an empty list":     {1, deflated(nil)},
		"a bomb of 64 MiB":  {1, bomb(64 << 20)},
		"one byte too much": {1, deflated(make([]byte, statuslist.MaxSize+1))},
	} {
		if l, err := statuslist.Decompress(c.bits, c.data); err == nil {
			t.Errorf("%s: it was taken, with %d tokens", name, l.Len())
		}
	}
	if l, err := statuslist.Decompress(8, deflated(make([]byte, statuslist.MaxSize))); err != nil || l.Len() != statuslist.MaxSize {
		t.Errorf("a list of the largest size: %v", err)
	}
}

// bomb is some MB that decompress to so many bytes.
func bomb(size int) []byte {
	var b bytes.Buffer
	z, _ := zlib.NewWriterLevel(&b, zlib.BestSpeed)
	zeros := make([]byte, 1<<20)
	for range size / len(zeros) {
		_, _ = z.Write(zeros)
	}
	z.Close()
	return b.Bytes()
}

func TestStatusList_SL01_ReferencesThatCannotBeReadAreErrors(t *testing.T) {
	decode := func(text string) (claims map[string]any) {
		d := json.NewDecoder(strings.NewReader(text))
		d.UseNumber()
		if err := d.Decode(&claims); err != nil {
			t.Fatal(err)
		}
		return claims
	}
	ref, ok, err := statuslist.ReferenceOf(decode(`{"status":{"status_list":{"idx":0,"uri":"https://a/1"}}}`))
	if err != nil || !ok || ref != (statuslist.Reference{URI: "https://a/1"}) {
		t.Errorf("a good one: %v, %v, %v", ref, ok, err)
	}
	floats := map[string]any{"status": map[string]any{"status_list": map[string]any{"idx": 8388607.0, "uri": "https://a/1"}}}
	if ref, ok, err := statuslist.ReferenceOf(floats); err != nil || !ok || ref.Index != 8388607 {
		t.Errorf("one with numbers as float64: %v, %v, %v", ref, ok, err)
	}
	for _, idx := range []float64{-1, 1.5, 8388608, 1e300, math.Inf(1), math.NaN()} {
		floats["status"].(map[string]any)["status_list"].(map[string]any)["idx"] = idx
		if _, ok, err := statuslist.ReferenceOf(floats); ok || err == nil {
			t.Errorf("idx %v: it was taken", idx)
		}
	}
	for _, text := range []string{`{}`, `{"status":{}}`, `{"status":{"other":1}}`} {
		if _, ok, err := statuslist.ReferenceOf(decode(text)); ok || err != nil {
			t.Errorf("%s: %v, %v; want none", text, ok, err)
		}
	}
	for _, text := range []string{
		`{"status":null}`, `{"status":1}`, `{"status":{"status_list":[]}}`, `{"status":{"status_list":{}}}`,
		`{"status":{"status_list":{"idx":1}}}`, `{"status":{"status_list":{"uri":"https://a/1"}}}`,
		`{"status":{"status_list":{"idx":-1,"uri":"https://a/1"}}}`, `{"status":{"status_list":{"idx":1.5,"uri":"https://a/1"}}}`,
		`{"status":{"status_list":{"idx":"1","uri":"https://a/1"}}}`, `{"status":{"status_list":{"idx":99999999999999999999,"uri":"https://a/1"}}}`,
		`{"status":{"status_list":{"idx":1,"uri":""}}}`, `{"status":{"status_list":{"idx":1,"uri":2}}}`,
		`{"status":{"status_list":{"idx":1,"uri":"https://a/` + strings.Repeat("x", 3000) + `"}}}`,
	} {
		if _, ok, err := statuslist.ReferenceOf(decode(text)); ok || err == nil {
			t.Errorf("%.80s: it was taken, or taken for none", text)
		}
	}
}

func TestASerialNumberIsAListAndAnIndex(t *testing.T) {
	id := statuslist.NewID([16]byte{1, 2, 3})
	serial, ok := statuslist.Reference{URI: "https://a/status/" + id, Index: 0x01020304}.Serial()
	if !ok || !statuslist.IsSerial(serial[:]) {
		t.Fatalf("%x, %v", serial, ok)
	}
	if got, index, ok := statuslist.Place(serial[:]); !ok || got != id || index != 0x01020304 {
		t.Errorf("its place is %s, %d, %v", got, index, ok)
	}
	for _, other := range []string{"", "00", strings.Repeat("0", 32), id + "00", strings.Repeat("x", 32)} {
		if _, ok := statuslist.Serial(other, 1); ok {
			t.Errorf("%q is no ID", other)
		}
	}
	certificate := bytes.Repeat([]byte{0x7f}, 20)
	if _, _, ok := statuslist.Place(certificate); ok || statuslist.IsSerial(serial[:19]) {
		t.Error("a certificate's serial number is taken for a token's")
	}
}

func FuzzDecompress(f *testing.F) {
	for _, v := range vectors {
		f.Add(v.bits, decoded(f, v.lst))
	}
	f.Add(1, []byte{})
	f.Add(8, deflated([]byte("hello")))
	f.Fuzz(func(t *testing.T, bits int, data []byte) {
		l, err := statuslist.Decompress(bits, data)
		if err != nil {
			return
		}
		if l.Len() < 1 || l.Len()*l.Bits() > 8*statuslist.MaxSize {
			t.Fatalf("a list of %d tokens of %d bits", l.Len(), l.Bits())
		}
		if _, ok := l.Status(l.Len()); ok {
			t.Fatal("it has an index beyond its end")
		}
		if _, ok := l.Status(l.Len() - 1); !ok {
			t.Fatal("it has not its last index")
		}
		again, err := statuslist.Decompress(bits, l.Compress())
		if err != nil || again.Len() != l.Len() || again.Count() != l.Count() {
			t.Fatalf("it is another after it was compressed: %v", err)
		}
	})
}

func FuzzReferenceOf(f *testing.F) {
	f.Add([]byte(`{"status":{"status_list":{"idx":0,"uri":"https://a/status/b0c7a0ee5f9ee1b2a9c5f3bdb1a0e2a1"}}}`), true)
	f.Add([]byte(`{"status":{"status_list":{"idx":1e3,"uri":"https://a/1"}}}`), false)
	f.Add([]byte(`{"status":{}}`), true)
	f.Fuzz(func(t *testing.T, text []byte, numbers bool) {
		d := json.NewDecoder(bytes.NewReader(text))
		if numbers {
			d.UseNumber()
		}
		var claims map[string]any
		if d.Decode(&claims) != nil {
			return
		}
		ref, ok, err := statuslist.ReferenceOf(claims)
		if ok != (ref != statuslist.Reference{}) || ok && (err != nil || ref.URI == "" || ref.Index < 0 || ref.Index >= 8*statuslist.MaxSize) {
			t.Fatalf("got %+v, %v, %v", ref, ok, err)
		}
		if serial, named := ref.Serial(); named {
			if id, index, is := statuslist.Place(serial[:]); !is || index != ref.Index || !strings.EqualFold(ref.URI[len(ref.URI)-32:], id) && !strings.HasSuffix(ref.URI, "/") {
				t.Fatalf("the serial number of %+v is of list %s, index %d", ref, id, index)
			}
		}
	})
}
