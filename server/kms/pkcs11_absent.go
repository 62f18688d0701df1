//go:build !(pkcs11 && cgo)

package kms

import (
	"errors"

	"go.step.sm/crypto/kms/apiv1"
)

// errPKCS11 is why this program cannot use PKCS #11, or nil.
var errPKCS11 = errors.New(`this hallmark was built without PKCS #11, which needs a C library; use one that was built with "make build-pkcs11"`)

func newPKCS11Keys(Options) (apiv1.KeyManager, error) { return nil, errPKCS11 }
