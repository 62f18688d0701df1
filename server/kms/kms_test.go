package kms_test

import (
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/server/kms"
)

func TestURIsOfKeyManagersAreTaken(t *testing.T) {
	for _, uri := range []string{
		"tpmkms:", "tpmkms:device=/dev/tpmrm0;storage-directory=/var/lib/keys", "awskms:region=us-gov-west-1;profile=signer",
		"cloudkms:project=p;location=europe-west1;key-ring=r;protection-level=hsm", "azurekms:vault=my-vault;hsm=true",
		"azurekms:endpoint=https://v.vault.usgovcloudapi.net", "transit:", "transit:address=https://vault:8200;mount=a/b;namespace=team/;token-file=/t;ca-file=/c",
	} {
		if err := kms.Check(uri); err != nil {
			t.Errorf("%q: %v", uri, err)
		}
	}
}

func TestURIsOfKeyManagersThatCannotBeMeantAreRefused(t *testing.T) {
	for uri, want := range map[string]string{
		"":                        "no uri",
		"%zz":                     "no URI",
		"softhsm":                 "no URI",
		"awskm:region=us-east-2":  `scheme "awskm", which is not supported; did you mean awskms:region=`,
		"yubikey:serial=1":        "it is one of awskms, azurekms, cloudkms, pkcs11, tpmkms, transit",
		"awskms:":                 `region ""; write one like eu-central-1`,
		"awskms:region=us east":   "write one like eu-central-1",
		"awskms:regoin=us-east-2": "did you mean region?",
		"awskms:region=us-east-2;secret-key=8765":                     "secrets are not in it",
		"awskms:region=us-east-2;key-id=8":                            "names its keys itself",
		"awskms:region=us-east-2;endpoint=http://kms":                 "not HTTPS",
		"cloudkms:project=p;location=l":                               `key-ring ""; write cloudkms:project=`,
		"cloudkms:project=p;location=l;key-ring=../x":                 `key-ring "../x"`,
		"cloudkms:project=p;location=l;key-ring=r;protection-level=x": "software or hsm",
		"azurekms:": "names no vault, or two",
		"azurekms:vault=a;endpoint=https://b.vault.azure.cn": "names no vault, or two",
		"azurekms:vault=evil.example/x":                      "write its name alone",
		"azurekms:vault=abc;hsm=yes":                         "true or false",
		"azurekms:vault=abc;client-secret=8765":              "secrets are not in it",
		"transit:mount=/a/":                                  "without slashes around it",
		"transit:token=8765":                                 "secrets are not in it",
		"transit:address=http://vault:8200":                  "not HTTPS",
		"transit:namespace=a b":                              "like team/a",
		"tpmkms:devise=/dev/tpmrm0":                          "did you mean device?",
		"tpmkms:device=":                                     "no value of device",
		"pkcs11:":                                            "names no token",
		"pkcs11:module-path=/x.so":                           "names no token",
		"pkcs11:token=a;serial=1":                            "more than one",
		"pkcs11:token=a;token=b":                             "more than one",
		"pkcs11:token=":                                      "no value of token",
		"pkcs11:token=a;tokn=b":                              "has tokn; it may have module-path, token",
		"pkcs11:token=a;object=k":                            "names its keys itself",
		"pkcs11:token=a?pin-value=8765":                      "pin_file",
		"pkcs11:token=a;pin-value=8765":                      "pin_file",
		"pkcs11:token=a?pin-source=/8765":                    "pin_file",
	} {
		err := kms.Check(uri)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got error %v, want one with %q", uri, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "8765") {
			t.Errorf("%q: the error %q shows the PIN", uri, err)
		}
	}
}
