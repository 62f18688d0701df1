// Package digest sums up what an agent holds, so that server and agent can
// compare it in sixteen bytes; and what a server knows, so that servers that
// share a store can be compared.
//
// A [Sum] is a set's digest: the 128-bit sum of a hash of each member. It does
// not depend on the order in which members came, and a member is taken out as
// cheaply as it was put in, so both ends of the push stream keep theirs up to
// date with each change instead of walking everything. It catches drift (a
// lost or doubled change, a bug), not an adversary: both ends trust each other,
// on a connection that protects what it carries.
package digest

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math/bits"
	"strconv"
)

// Size is the length of a [Sum] in bytes.
const Size = 16

// Sum is the digest of a set of entries, bundles, CRLs and status lists: a number
// of 128 bits, little endian. The zero value is that of the empty set.
type Sum [Size]byte

// AddEntry puts an entry into the set: its ID, its revision number, and when it
// was created in Unix seconds. A deleted and recreated entry of the same ID
// starts at revision 0 again, which is why the time is part of it.
func (s *Sum) AddEntry(id string, revision, created int64) { s.add(entry(id, revision, created)) }

// SubEntry takes out an entry that was put in with the same values.
func (s *Sum) SubEntry(id string, revision, created int64) { s.sub(entry(id, revision, created)) }

// AddBundle puts a bundle into the set: its trust domain's name and its
// sequence number.
func (s *Sum) AddBundle(name string, seq uint64) { s.add(bundle(name, seq)) }

// SubBundle takes out a bundle that was put in with the same values.
func (s *Sum) SubBundle(name string, seq uint64) { s.sub(bundle(name, seq)) }

// AddCRL puts a CRL into the set: the ID of its authority, and its number.
func (s *Sum) AddCRL(authority string, number uint64) { s.add(crl(authority, number)) }

// SubCRL takes out a CRL that was put in with the same values.
func (s *Sum) SubCRL(authority string, number uint64) { s.sub(crl(authority, number)) }

// AddStatusList puts a status list into the set: its ID, and the revision that
// wrote it.
func (s *Sum) AddStatusList(id string, revision int64) { s.add(statusList(id, revision)) }

// SubStatusList takes out a status list that was put in with the same values.
func (s *Sum) SubStatusList(id string, revision int64) { s.sub(statusList(id, revision)) }

// AddRecord puts a record of a store into the set: its key and the revision that
// wrote it.
func (s *Sum) AddRecord(key string, revision int64) { s.add(record(key, revision)) }

// SubRecord takes out a record that was put in with the same values.
func (s *Sum) SubRecord(key string, revision int64) { s.sub(record(key, revision)) }

// Merge puts in all members of another set, which has none of this one's.
func (s *Sum) Merge(other Sum) { s.add(other.get()) }

// String returns the sum in hexadecimal, for logs.
func (s Sum) String() string { return hex.EncodeToString(s[:]) }

// number is a member's hash, or a sum, as two halves.
type number struct{ lo, hi uint64 }

func entry(id string, revision, created int64) number {
	b := make([]byte, 0, 128)
	b = append(b, "entry\x00"...)
	b = append(b, id...)
	b = append(b, 0)
	b = strconv.AppendInt(b, revision, 10)
	b = append(b, 0)
	b = strconv.AppendInt(b, created, 10)
	return hash(b)
}

func bundle(name string, seq uint64) number { return named("bundle\x00", name, seq) }

func crl(authority string, n uint64) number { return named("crl\x00", authority, n) }

func statusList(id string, revision int64) number {
	return named("status list\x00", id, uint64(revision))
}

func named(kind, name string, seq uint64) number {
	b := make([]byte, 0, 128)
	b = append(b, kind...)
	b = append(b, name...)
	b = append(b, 0)
	b = strconv.AppendUint(b, seq, 10)
	return hash(b)
}

func record(key string, revision int64) number {
	b := make([]byte, 0, 128)
	b = append(b, "record\x00"...)
	b = append(b, key...)
	b = append(b, 0)
	b = strconv.AppendInt(b, revision, 10)
	return hash(b)
}

func hash(b []byte) number {
	h := sha256.Sum256(b)
	return number{binary.LittleEndian.Uint64(h[0:]), binary.LittleEndian.Uint64(h[8:])}
}

func (s *Sum) get() number {
	return number{binary.LittleEndian.Uint64(s[0:]), binary.LittleEndian.Uint64(s[8:])}
}

func (s *Sum) put(n number) {
	binary.LittleEndian.PutUint64(s[0:], n.lo)
	binary.LittleEndian.PutUint64(s[8:], n.hi)
}

func (s *Sum) add(n number) {
	m := s.get()
	lo, carry := bits.Add64(m.lo, n.lo, 0)
	hi, _ := bits.Add64(m.hi, n.hi, carry)
	s.put(number{lo, hi})
}

func (s *Sum) sub(n number) {
	m := s.get()
	lo, borrow := bits.Sub64(m.lo, n.lo, 0)
	hi, _ := bits.Sub64(m.hi, n.hi, borrow)
	s.put(number{lo, hi})
}
