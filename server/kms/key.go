package kms

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"

	"go.step.sm/crypto/kms/apiv1"
)

// keyName is what a key may be called: it becomes the name of a file, or part of
// a name in a service.
var keyName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$`)

// CheckName reports whether a key may have that name.
func CheckName(name string) error {
	if !keyName.MatchString(name) {
		return fmt.Errorf("invalid key name %q: it is 1 to 100 letters, digits, '.', '_' and '-', beginning with a letter, digit or '_'", name)
	}
	return nil
}

// remoteName is what a key in a service may be called: what every service takes in
// labels and tags.
var remoteName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)

func checkRemoteName(name string) error {
	if !remoteName.MatchString(name) {
		return fmt.Errorf("invalid key name %q: it is 1 to 63 small letters, digits, '_' and '-', beginning with a letter or digit", name)
	}
	return nil
}

// Supported says why the key managers do not make a key.
func Supported(req *apiv1.CreateKeyRequest) error {
	_, err := typeOf(req)
	return err
}

// keyType is a kind of key, by the name that a configuration has for it.
type keyType string

const (
	p256    keyType = "ec-p256"
	p384    keyType = "ec-p384"
	rsa2048 keyType = "rsa-2048"
	rsa3072 keyType = "rsa-3072"
	rsa4096 keyType = "rsa-4096"
)

func typeOf(req *apiv1.CreateKeyRequest) (keyType, error) {
	switch req.SignatureAlgorithm {
	case apiv1.UnspecifiedSignAlgorithm, apiv1.ECDSAWithSHA256:
		return p256, nil
	case apiv1.ECDSAWithSHA384:
		return p384, nil
	case apiv1.SHA256WithRSA, apiv1.SHA384WithRSA, apiv1.SHA512WithRSA:
		if !slices.Contains([]int{2048, 3072, 4096}, req.Bits) {
			return "", fmt.Errorf("an RSA key of %d bits is not supported; use 2048, 3072 or 4096", req.Bits)
		}
		return keyType(fmt.Sprintf("rsa-%d", req.Bits)), nil
	}
	return "", fmt.Errorf("keys for %s are not supported; use ECDSA with P-256 or P-384, or RSA", req.SignatureAlgorithm)
}

// typeOfPublic returns what kind a public key is of.
func typeOfPublic(public crypto.PublicKey) (keyType, error) {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return p256, nil
		case elliptic.P384():
			return p384, nil
		}
	case *rsa.PublicKey:
		switch bits := k.N.BitLen(); {
		case k.E != 65537:
		case bits == 2048 || bits == 3072 || bits == 4096:
			return keyType(fmt.Sprintf("rsa-%d", bits)), nil
		}
	}
	return "", errors.New("the service has a key that is neither on P-256 or P-384 nor RSA of 2048, 3072 or 4096 bits")
}

// hash returns that of what keys of a kind sign. Services take no other.
func (t keyType) hash() crypto.Hash {
	if t == p384 {
		return crypto.SHA384
	}
	return crypto.SHA256
}

// jws returns the algorithm of a kind's signatures. RFC 7518 §3.1.
func (t keyType) jws() string {
	switch t {
	case p256:
		return "ES256"
	case p384:
		return "ES384"
	}
	return "RS256"
}

// verify checks a signature: in DER of ECDSA, of PKCS #1 v1.5 with RSA.
func verify(public crypto.PublicKey, hash crypto.Hash, digest, signature []byte) error {
	good := false
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		good = ecdsa.VerifyASN1(k, digest, signature)
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(k, hash, digest, signature) == nil
	}
	if !good {
		return errors.New("its signature is not of the key that it was asked to sign with")
	}
	return nil
}

// owner is whose the keys are: one server of one trust domain. Others may have
// keys in the same place.
type owner struct{ trustDomain, server string }

// label returns the full name of a key.
func (o owner) label(name string) string {
	return "hallmark/" + o.trustDomain + "/" + o.server + "/" + name
}

// id returns 16 letters that stand for the owner where there is no room for its
// name, or not every character is taken.
func (o owner) id() string { return short("hallmark/"+o.trustDomain+"/"+o.server, 8) }

// prefix is what the names of the owner's keys begin with where names are all
// that a service lists.
func (o owner) prefix() string { return "hallmark-" + o.id() + "-" }

// short returns the beginning of a text's SHA-256, as twice as many letters as
// bytes.
func short(text string, bytes int) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:bytes])
}
