# SPDX-License-Identifier: MIT
"""Matrix products on any GPU, by nothing but the standard library: ctypes and the system's Vulkan loader.

    with VulkanGemm() as gpu:
        c = gpu.matmul(a, b)            # lists of rows in, lists of rows out, float32 inside

`python vulkan_gemm.py` lists the devices, chooses the best, and checks its products. The environment variable
MICROGPT_VULKAN_DEVICE (a number from that list) chooses another.

What a GPU program is. The *host* (this Python) finds a *device* and opens it. It asks for *memory* that both
can reach and puts the inputs there. A *pipeline* is a compiled device program (a *shader*, here gemm.comp)
along with the shape of its arguments. A *descriptor set* says which buffers those arguments are. The host
writes a *command buffer*, a list of jobs ("run this pipeline on so many workgroups"), and submits it to a
*queue*. The device works on its own and raises a flag at the end, a *fence*, which the host waits for. Every
Vulkan call below is one of those steps. There are many because Vulkan hides nothing, but each is small.
"""
import base64, ctypes, hashlib, os, re, shutil, struct, subprocess, sys, threading, time, zlib
from array import array
from contextlib import AbstractContextManager, ExitStack
from ctypes import addressof, byref, c_char, c_char_p, c_int32, c_uint32, c_uint64, c_void_p
from itertools import chain, product
from operator import mul
from random import Random

BLOCK, TILE = 8, 64   # an invocation (GPU thread) of gemm.comp makes 8 x 8 elements, a workgroup 64 x 64
MAX_GROUPS = 65535    # workgroups along x or y in one dispatch: the least that devices must allow
MAX_K = 1 << 13       # longer dot products take several dispatches, as some drivers cut long loops short
MAX_TERMS = 1 << 29   # multiplications in one submission: less than half a second, even on a processor
WAIT_SLICE = 0.05     # seconds: Python handles signals only between two waits

class VulkanError(RuntimeError):
    """Anything that keeps Vulkan from doing its work, in one line."""

# ---- Structures ------------------------------------------------------------------------------------------
# Vulkan takes its arguments in C structures. Each line declares one: its name, its sType if it has one, then
# the specification's field names in the specification's order. sType says which structure this is, and pNext
# starts a chain of extensions (unused here). A structure with an sType has both of them in front.
# The letters: u and i are 32-bit integers, q a 64-bit one, z a size_t, p a pointer, s a C string, c a byte,
# and h a handle, the 64-bit name of a Vulkan object (but instances, devices, queues and command buffers are
# pointers). A number after the letter makes an array. VkPhysicalDeviceLimits has 106 fields. Those that do
# not matter here (of images, of graphics stages and the like) are folded into a few arrays.

LETTERS = {"u": c_uint32, "i": c_int32, "q": c_uint64, "h": c_uint64, "z": ctypes.c_size_t, "c": c_char,
           "p": c_void_p, "s": c_char_p}

STRUCTURES = """
VkApplicationInfo 0 pApplicationName:s applicationVersion:u pEngineName:s engineVersion:u apiVersion:u
VkInstanceCreateInfo 1 flags:u pApplicationInfo:p enabledLayerCount:u ppEnabledLayerNames:p
    enabledExtensionCount:u ppEnabledExtensionNames:p
VkDeviceQueueCreateInfo 2 flags:u queueFamilyIndex:u queueCount:u pQueuePriorities:p
VkDeviceCreateInfo 3 flags:u queueCreateInfoCount:u pQueueCreateInfos:p enabledLayerCount:u
    ppEnabledLayerNames:p enabledExtensionCount:u ppEnabledExtensionNames:p pEnabledFeatures:p
VkSubmitInfo 4 waitSemaphoreCount:u pWaitSemaphores:p pWaitDstStageMask:p commandBufferCount:u
    pCommandBuffers:p signalSemaphoreCount:u pSignalSemaphores:p
VkMemoryAllocateInfo 5 allocationSize:q memoryTypeIndex:u
VkFenceCreateInfo 8 flags:u
VkBufferCreateInfo 12 flags:u size:q usage:u sharingMode:u queueFamilyIndexCount:u pQueueFamilyIndices:p
VkBufferViewCreateInfo 13 flags:u buffer:h format:u offset:q range:q
VkShaderModuleCreateInfo 16 flags:u codeSize:z pCode:p
VkPipelineShaderStageCreateInfo 18 flags:u stage:u module:h pName:s pSpecializationInfo:p
VkComputePipelineCreateInfo 29 flags:u stage:VkPipelineShaderStageCreateInfo layout:h basePipelineHandle:h
    basePipelineIndex:i
VkPipelineLayoutCreateInfo 30 flags:u setLayoutCount:u pSetLayouts:p pushConstantRangeCount:u
    pPushConstantRanges:p
VkPushConstantRange stageFlags:u offset:u size:u
VkDescriptorSetLayoutBinding binding:u descriptorType:u descriptorCount:u stageFlags:u pImmutableSamplers:p
VkDescriptorSetLayoutCreateInfo 32 flags:u bindingCount:u pBindings:p
VkDescriptorPoolSize type:u descriptorCount:u
VkDescriptorPoolCreateInfo 33 flags:u maxSets:u poolSizeCount:u pPoolSizes:p
VkDescriptorSetAllocateInfo 34 descriptorPool:h descriptorSetCount:u pSetLayouts:p
VkDescriptorBufferInfo buffer:h offset:q range:q
VkWriteDescriptorSet 35 dstSet:h dstBinding:u dstArrayElement:u descriptorCount:u descriptorType:u
    pImageInfo:p pBufferInfo:p pTexelBufferView:p
VkCommandPoolCreateInfo 39 flags:u queueFamilyIndex:u
VkCommandBufferAllocateInfo 40 commandPool:h level:u commandBufferCount:u
VkCommandBufferBeginInfo 42 flags:u pInheritanceInfo:p
VkMemoryBarrier 46 srcAccessMask:u dstAccessMask:u
VkMemoryRequirements size:q alignment:q memoryTypeBits:u
VkQueueFamilyProperties queueFlags:u queueCount:u timestampValidBits:u minImageTransferGranularity:u3
VkMemoryType propertyFlags:u heapIndex:u
VkMemoryHeap size:q flags:u
VkPhysicalDeviceMemoryProperties memoryTypeCount:u memoryTypes:VkMemoryType32 memoryHeapCount:u
    memoryHeaps:VkMemoryHeap16
VkExtensionProperties extensionName:c256 specVersion:u
VkPhysicalDeviceLimits imageLimits:u5 maxTexelBufferElements:u maxUniformBufferRange:u
    maxStorageBufferRange:u allocationLimits:u3 granularityLimits:q2
    graphicsLimits:u38 maxComputeSharedMemorySize:u maxComputeWorkGroupCount:u3
    maxComputeWorkGroupInvocations:u maxComputeWorkGroupSize:u3 otherLimits:q32
VkPhysicalDeviceProperties apiVersion:u driverVersion:u vendorID:u deviceID:u deviceType:u deviceName:c256
    pipelineCacheUUID:c16 limits:VkPhysicalDeviceLimits sparseProperties:u5
"""

def declare(name, s_type, fields, declared):
    """Return the ctypes class for one line of the table. Pointer fields are given the object to point to."""
    pairs = [("sType", c_uint32), ("pNext", c_void_p)] if s_type else []
    for field, kind, length in re.findall(r"(\w+):([A-Za-z]+)(\d*)", fields):
        element = LETTERS.get(kind) or declared[kind]
        pairs.append((field, element * int(length) if length else element))
    pointers = {field for field, kind in pairs if kind is c_void_p}
    defaults = {"sType": int(s_type)} if s_type else {}

    def __init__(self, **values):
        self.pointees = values  # a structure holds bare addresses: keep alive what they point to
        values = {field: addressof(x) if field in pointers else x for field, x in values.items()}
        ctypes.Structure.__init__(self, **values, **defaults)

    return type(name, (ctypes.Structure,), {"_fields_": pairs, "__init__": __init__})

for _name, _s_type, _fields in re.findall(r"(?m)^(Vk\w+)(?: (\d+))?((?:\s+\w+:\w+)+)", STRUCTURES):
    globals()[_name] = declare(_name, _s_type, _fields, globals())

# The values of the specification's enumerations that are used here. All functions and the shader are those of
# Vulkan 1.0, so any driver will do. The program says that it knows 1.1 because one extension, which macOS
# needs (see "Instance and device"), builds on a part of it.
API_VERSION = 1 << 22 | 1 << 12                                 # Vulkan 1.1, of 2018
ENUMERATE_PORTABILITY = 1                                       # VkInstanceCreateFlags
QUEUE_COMPUTE, ONE_TIME_SUBMIT = 2, 1                           # VkQueueFlags, VkCommandBufferUsageFlags
DEVICE_TYPES = {2: "discrete", 3: "virtual", 1: "integrated", 4: "cpu", 0: "other"}  # in order of preference
DEVICE_LOCAL, HOST_VISIBLE, HOST_COHERENT, HOST_CACHED = 1, 2, 4, 8  # VkMemoryPropertyFlags
TEXEL_USAGE, STORAGE_USAGE = 4, 32                              # VkBufferUsageFlags
TEXEL_BUFFER, STORAGE_BUFFER = 4, 7                             # VkDescriptorType
FOUR_FLOATS = 109                                               # VkFormat: R32G32B32A32_SFLOAT
COMPUTE, BIND_COMPUTE = 32, 1                                   # VkShaderStageFlags, VkPipelineBindPoint
STAGE_COMPUTE, STAGE_HOST = 0x800, 0x4000                       # VkPipelineStageFlags
SHADER_READ, SHADER_WRITE, HOST_READ = 0x20, 0x40, 0x2000       # VkAccessFlags

# ---- The loader ------------------------------------------------------------------------------------------
# Vulkan's functions live in one system library, the loader, which passes each call on to the right driver.
# Each word is a function and the letters of its arguments. "=" marks those that return a VkResult: 0 is
# success, a negative number an error, and a positive one (here only of a wait that ran out of time) neither.

RESULT_NAMES = dict(zip(range(-1, -12, -1), """OUT_OF_HOST_MEMORY OUT_OF_DEVICE_MEMORY INITIALIZATION_FAILED
    DEVICE_LOST MEMORY_MAP_FAILED LAYER_NOT_PRESENT EXTENSION_NOT_PRESENT FEATURE_NOT_PRESENT
    INCOMPATIBLE_DRIVER TOO_MANY_OBJECTS FORMAT_NOT_SUPPORTED""".split()))

# What the loader answers where there is no driver, and where no driver has found its device.
MISSING = {("vkCreateInstance", -9): "driver", ("vkEnumeratePhysicalDevices", -3): "device"}

FUNCTIONS = """
vkEnumerateInstanceExtensionProperties=ppp vkCreateInstance=ppp vkDestroyInstance:pp
vkEnumeratePhysicalDevices=ppp vkGetPhysicalDeviceProperties:pp vkGetPhysicalDeviceMemoryProperties:pp
vkGetPhysicalDeviceQueueFamilyProperties:ppp vkEnumerateDeviceExtensionProperties=pppp vkCreateDevice=pppp
vkDestroyDevice:pp vkGetDeviceQueue:puup vkCreateBuffer=pppp vkDestroyBuffer:php vkCreateBufferView=pppp
vkDestroyBufferView:php vkGetBufferMemoryRequirements:php vkAllocateMemory=pppp vkFreeMemory:php
vkBindBufferMemory=phhq vkMapMemory=phqqup vkCreateShaderModule=pppp vkDestroyShaderModule:php
vkCreateDescriptorSetLayout=pppp vkDestroyDescriptorSetLayout:php vkCreatePipelineLayout=pppp
vkDestroyPipelineLayout:php vkCreateComputePipelines=phuppp vkDestroyPipeline:php vkCreateDescriptorPool=pppp
vkDestroyDescriptorPool:php vkAllocateDescriptorSets=ppp vkUpdateDescriptorSets:pupup vkCreateCommandPool=pppp
vkDestroyCommandPool:php vkResetCommandPool=phu vkAllocateCommandBuffers=ppp vkBeginCommandBuffer=pp
vkEndCommandBuffer=p vkCmdBindPipeline:puh vkCmdBindDescriptorSets:puhuupup vkCmdPushConstants:phuuup
vkCmdDispatch:puuu vkCmdPipelineBarrier:puuuupupup vkCreateFence=pppp vkDestroyFence:php vkResetFences=pup
vkWaitForFences=pupuq vkQueueSubmit=puph vkQueueWaitIdle=p
"""

INSTALL = {"apt": "apt install libvulkan1 mesa-vulkan-drivers",
           "dnf": "dnf install vulkan-loader mesa-vulkan-drivers",
           "pacman": "pacman -S vulkan-icd-loader and your card's driver, such as vulkan-radeon",
           "apk": "apk add vulkan-loader and your card's driver, such as mesa-vulkan-ati",
           "brew": "brew install vulkan-loader molten-vk"}

def open_library():
    """Return the system's Vulkan loader, or on macOS at least MoltenVK, which can do without a loader."""
    names = {"win32": ["vulkan-1.dll"],
             "darwin": ["libvulkan.1.dylib", "libvulkan.dylib", "libMoltenVK.dylib"]}
    names = names.get(sys.platform, ["libvulkan.so.1", "libvulkan.so"])
    folders = ["", "/opt/homebrew/lib", "/usr/local/lib"] if sys.platform == "darwin" else [""]  # Homebrew's
    if "VULKAN_SDK" in os.environ:
        folders.append(os.path.join(os.environ["VULKAN_SDK"], "lib"))
    for name, folder in product(names, folders):
        try:
            return (ctypes.WinDLL if sys.platform == "win32" else ctypes.CDLL)(os.path.join(folder, name))
        except OSError:
            continue
    raise missing("loader")

def missing(part):
    """Return the error for a part of Vulkan that is not there. It says what to install."""
    hints = [command for program, command in INSTALL.items() if shutil.which(program)]
    hints.append("install the driver of your graphics card, or the Vulkan SDK")
    return VulkanError(f"no Vulkan {part} on this system ({hints[0]})")

class Vulkan:
    """The loader's functions, each with its argument types, and with its VkResult checked if it has one."""

    def __init__(self):
        library = open_library()
        for name, returns, letters in re.findall(r"(\w+)([=:])(\w+)", FUNCTIONS):
            function = getattr(library, name)
            function.argtypes = [LETTERS[letter] for letter in letters]
            function.restype = c_int32 if returns == "=" else None
            setattr(self, name, self._checked(name, function) if returns == "=" else function)

    @staticmethod
    def _checked(name, function):
        def call(*arguments):
            result = function(*arguments)
            if (name, result) in MISSING:
                raise missing(MISSING[name, result])
            if result < 0:
                raise VulkanError(f"{name}: VK_ERROR_{RESULT_NAMES.get(result, result)}")
            return result
        return call

    def create(self, kind, device, info, undo):
        """Return the handle that vkCreate<kind>(device, info) makes. `undo` is to destroy the object."""
        handle = c_uint64()
        getattr(self, "vkCreate" + kind)(device, byref(info), None, byref(handle))
        undo.callback(getattr(self, "vkDestroy" + kind), device, handle, None)
        return handle.value

    @staticmethod
    def array_of(element, function, *arguments):
        """Return an array as Vulkan does, in two calls: one for the count, one for the elements."""
        count = c_uint32()
        function(*arguments, byref(count), None)
        elements = (element * count.value)()
        function(*arguments, byref(count), elements)
        return list(elements[:count.value])

# ---- Instance and device ---------------------------------------------------------------------------------
# The instance is this program's connection to Vulkan, and through it the physical devices are listed. A
# device has families of queues, and any queue that can compute will do. Drivers that map Vulkan onto another
# interface (MoltenVK on macOS) are hidden unless a program says with a "portability" extension that it
# expects them.

def if_offered(extension, vk, function, *owner):
    """Return the arguments of vkCreate... that enable an extension where there is one."""
    offered = {each.extensionName for each in vk.array_of(VkExtensionProperties, function, *owner, None)}
    names = (c_char_p * 1)(extension)
    return {"enabledExtensionCount": int(extension in offered), "ppEnabledExtensionNames": names}

def create_instance(vk):
    extension = if_offered(b"VK_KHR_portability_enumeration", vk, vk.vkEnumerateInstanceExtensionProperties)
    application = VkApplicationInfo(pApplicationName=b"vulkan_gemm", apiVersion=API_VERSION)
    info = VkInstanceCreateInfo(flags=ENUMERATE_PORTABILITY * extension["enabledExtensionCount"],
                                pApplicationInfo=application, **extension)
    instance = c_void_p()
    vk.vkCreateInstance(byref(info), None, byref(instance))
    return instance.value

class PhysicalDevice:
    """What a device says about itself before it is opened."""

    def __init__(self, vk, handle):
        properties, self.memory = VkPhysicalDeviceProperties(), VkPhysicalDeviceMemoryProperties()
        vk.vkGetPhysicalDeviceProperties(handle, byref(properties))
        vk.vkGetPhysicalDeviceMemoryProperties(handle, byref(self.memory))
        self.handle, self.limits = handle, properties.limits
        self.name = properties.deviceName.decode(errors="replace")
        self.kind = DEVICE_TYPES.get(properties.deviceType, "other")
        families = vk.array_of(VkQueueFamilyProperties, vk.vkGetPhysicalDeviceQueueFamilyProperties, handle)
        self.queue_families = [i for i, each in enumerate(families) if each.queueFlags & QUEUE_COMPUTE]

def list_devices(vk, instance):
    """Return the devices that can compute, the best kinds first."""
    handles = vk.array_of(c_void_p, vk.vkEnumeratePhysicalDevices, instance)
    devices = [PhysicalDevice(vk, handle) for handle in handles]
    kinds = list(DEVICE_TYPES.values())
    return sorted([each for each in devices if each.queue_families], key=lambda each: kinds.index(each.kind))

def choose_device(devices):
    """Return the first device, or the one that MICROGPT_VULKAN_DEVICE names by its index."""
    wanted = os.environ.get("MICROGPT_VULKAN_DEVICE") or "0"
    if not devices:
        raise missing("device")
    if not wanted.isdecimal() or int(wanted) >= len(devices):
        raise VulkanError(f"MICROGPT_VULKAN_DEVICE={wanted} must be a number below {len(devices)}")
    return devices[int(wanted)]

def create_device(vk, physical):
    extension = if_offered(b"VK_KHR_portability_subset", vk, vk.vkEnumerateDeviceExtensionProperties,
                           physical.handle)  # must be enabled where it is offered
    queue = VkDeviceQueueCreateInfo(queueFamilyIndex=physical.queue_families[0], queueCount=1,
                                    pQueuePriorities=ctypes.c_float(1.0))
    info = VkDeviceCreateInfo(queueCreateInfoCount=1, pQueueCreateInfos=queue, **extension)
    device = c_void_p()
    vk.vkCreateDevice(physical.handle, byref(info), None, byref(device))
    return device.value

# ---- Memory ----------------------------------------------------------------------------------------------
# A buffer is a range of bytes that shaders can use. It is bound to memory of one of the device's types, here
# always one that the host can see: the specification promises one for every buffer. It stays mapped, so that
# Python writes straight into it. Best for inputs is memory of the device's own. Many cards have a window of
# only 256 MB to it, shared by all programs; when that is full, the next type must do. Results should be in
# "cached" memory, since the host reads any other very slowly. All is "coherent": no need to flush it.
#
# So a card writes C over the bus, and where K is long, reads it back to add to it. The textbook keeps C in
# the device's own memory and copies it at the end. Both were measured on an NVIDIA H200: the shader then
# takes 0.65 of the time at 1024 x 1024, but the whole product 0.97, as Python takes 12 to 29 ns to pack a
# number; and at 64 x 64, where the copy is one job more, 1.17. So C stays where the host can see it.

HOST = HOST_VISIBLE | HOST_COHERENT

class Buffer:
    """A buffer that grows by powers of two. The host sees its bytes in `mapped`, a ctypes array, and shaders
    see those of an input as vec4s, through a *view*."""

    def __init__(self, vk, device, physical, is_input):
        self.vk, self.device, self.physical, self.is_input = vk, device, physical, is_input
        limits = physical.limits
        self.limit = 16 * limits.maxTexelBufferElements if is_input else limits.maxStorageBufferRange & ~3
        self.capacity, self.handle, self.view, self.mapped = 0, None, None, None
        self._undo, self._memory = ExitStack(), ExitStack()  # memory is freed after what uses it

    def reserve(self, size):
        """Make room for `size` bytes. If that takes a new buffer, what was in the old one is lost."""
        if size > self.limit:
            raise VulkanError(f"{size} bytes in one buffer are more than {self.physical.name} allows")
        self.free()
        capacity = min(self.limit, max(1 << 20, 1 << (size - 1).bit_length()))
        info = VkBufferCreateInfo(size=capacity, usage=TEXEL_USAGE if self.is_input else STORAGE_USAGE)
        self.handle = self.vk.create("Buffer", self.device, info, self._undo)
        self.mapped = (c_char * capacity).from_address(self._bind())
        if self.is_input:
            info = VkBufferViewCreateInfo(buffer=self.handle, format=FOUR_FLOATS, range=capacity)
            self.view = self.vk.create("BufferView", self.device, info, self._undo)
        self.capacity = capacity

    def _bind(self):
        """Give the buffer memory of the best type that has enough of it. Return where the host sees it."""
        needs = VkMemoryRequirements()
        self.vk.vkGetBufferMemoryRequirements(self.device, self.handle, byref(needs))
        failure = VulkanError(f"{self.physical.name} has no memory for a buffer of {needs.size} bytes")
        for index in self._memory_types(needs):
            info = VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=index)
            memory, address = c_uint64(), c_void_p()
            try:
                self.vk.vkAllocateMemory(self.device, byref(info), None, byref(memory))
                self._memory.callback(self.vk.vkFreeMemory, self.device, memory.value, None)
                self.vk.vkMapMemory(self.device, memory.value, 0, needs.size, 0, byref(address))
            except VulkanError as error:
                failure = error
                continue
            self.vk.vkBindBufferMemory(self.device, self.handle, memory.value, 0)
            return address.value
        raise failure

    def _memory_types(self, needs):
        """Return the indices of the memory types that suit the buffer, the best first."""
        memory = self.physical.memory
        flags = {i: kind.propertyFlags for i, kind in enumerate(memory.memoryTypes[:memory.memoryTypeCount])
                 if needs.memoryTypeBits >> i & 1 and needs.size <= memory.memoryHeaps[kind.heapIndex].size}
        best = HOST | (DEVICE_LOCAL if self.is_input else HOST_CACHED)
        return [i for wanted in (best, HOST) for i in flags
                if flags[i] & wanted == wanted and flags[i] < 16]  # higher flags are of extensions

    def free(self):
        self.capacity, self.handle, self.view, self.mapped = 0, None, None, None
        self._undo.close()
        self._memory.close()

# ---- Lists of rows and bytes -----------------------------------------------------------------------------
# The slow part of a small product is not the arithmetic but turning Python floats into packed 32-bit ones and
# back. One C call moves a whole row: struct.pack_into writes it straight to the memory that the device reads.

def shape_of(rows, name):
    widths = {len(row) for row in rows}
    if len(widths) != 1 or widths == {0}:
        raise ValueError(f"{name} is empty, or its rows differ in length")
    return len(rows), len(rows[0])

def write_rows(rows, pitch, buffer, offset):
    """Pack the rows into the buffer from byte `offset` on, each padded with zeros to `pitch` vec4s."""
    width = len(rows[0])
    if sys.implementation.name == "pypy":  # where a call with hundreds of arguments is slow
        padding = [0.0] * (4 * pitch - width)
        floats = array("f", chain.from_iterable(chain(row, padding) for row in rows))
        ctypes.memmove(addressof(buffer.mapped) + offset, floats.buffer_info()[0], 4 * len(floats))
        return
    view, pack_into = memoryview(buffer.mapped), struct.Struct(f"{width}f{16 * pitch - 4 * width}x").pack_into
    for row in rows:
        pack_into(view, offset, *row)
        offset += 16 * pitch

def read_rows(buffer, offset, height, width):
    packed = ctypes.string_at(addressof(buffer.mapped) + offset, 4 * height * width)
    return list(map(list, struct.iter_unpack(f"{width}f", packed)))

# ---- Products --------------------------------------------------------------------------------------------
# All products of a call lie one after another in the buffers, and go in one submission, since a submission
# costs as much as a small product. If they are too much for the buffers, or would keep the device busy for
# long (Windows resets it after two seconds), the call is halved, and if need be, a large product is, too.
# Along K, a product takes several dispatches, and each adds to what the one before has left in C.

CONSTANTS = struct.Struct("8I")  # those of gemm.comp, in its order

def round_up(n, unit):
    return -(-n // unit) * unit

class VulkanGemm(AbstractContextManager):
    """Matrix products on one device; a context manager. Threads that share it take turns."""

    def __init__(self, timeout=120.0):
        self.timeout, self.pending, self.closed = timeout, False, False
        self.shader_seconds = 0.0  # what the last call spent on the device, without turning lists into bytes
        self._descriptors_stale = True
        self._lock = threading.Lock()
        self._undo = ExitStack()  # how to free what was made so far, last made first
        try:
            self._open_device()
            self._make_pipeline(load_shader())
            self._make_descriptor_set()
            self._make_commands()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Free everything. Does nothing the second time."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            try:
                self._finish_pending()
            except VulkanError:
                self._undo.pop_all()  # the device may be running still, see _submit()
            self._undo.close()

    def _create(self, kind, info):
        return self.vk.create(kind, self.device, info, self._undo)

    def _open_device(self):
        self.vk = vk = Vulkan()
        self.instance = create_instance(vk)
        self._undo.callback(vk.vkDestroyInstance, self.instance, None)
        self.physical = choose_device(list_devices(vk, self.instance))
        # A software device takes its time from Python's processor, and all its threads count.
        self.clock = time.process_time if self.physical.kind == "cpu" else time.perf_counter
        self.device = create_device(vk, self.physical)
        self._undo.callback(vk.vkDestroyDevice, self.device, None)
        queue = c_void_p()
        vk.vkGetDeviceQueue(self.device, self.physical.queue_families[0], 0, byref(queue))
        self.queue = queue.value
        self.buffers = [Buffer(vk, self.device, self.physical, is_input) for is_input in (True, True, False)]
        for buffer in self.buffers:
            self._undo.callback(buffer.free)

    def _make_pipeline(self, spirv):
        """Make a pipeline of the shader and the shape of its arguments: three buffers and push constants."""
        bindings = (VkDescriptorSetLayoutBinding * 3)(*[VkDescriptorSetLayoutBinding(
            binding=i, descriptorType=kind, descriptorCount=1, stageFlags=COMPUTE)
            for i, kind in enumerate((TEXEL_BUFFER, TEXEL_BUFFER, STORAGE_BUFFER))])
        self.set_layout = self._create("DescriptorSetLayout", VkDescriptorSetLayoutCreateInfo(
            bindingCount=3, pBindings=bindings))
        constants = VkPushConstantRange(stageFlags=COMPUTE, size=CONSTANTS.size)
        self.layout = self._create("PipelineLayout", VkPipelineLayoutCreateInfo(
            setLayoutCount=1, pSetLayouts=c_uint64(self.set_layout),
            pushConstantRangeCount=1, pPushConstantRanges=constants))
        code = (c_uint32 * (len(spirv) // 4)).from_buffer_copy(spirv)
        info, pipeline = VkShaderModuleCreateInfo(codeSize=len(spirv), pCode=code), c_uint64()
        with ExitStack() as undo:  # the pipeline has its own copy of the module
            module = self.vk.create("ShaderModule", self.device, info, undo)
            stage = VkPipelineShaderStageCreateInfo(stage=COMPUTE, module=module, pName=b"main")
            info = VkComputePipelineCreateInfo(stage=stage, layout=self.layout, basePipelineIndex=-1)
            self.vk.vkCreateComputePipelines(self.device, 0, 1, byref(info), None, byref(pipeline))
        self.pipeline = pipeline.value
        self._undo.callback(self.vk.vkDestroyPipeline, self.device, self.pipeline, None)

    def _make_descriptor_set(self):
        sizes = (VkDescriptorPoolSize * 2)(VkDescriptorPoolSize(type=TEXEL_BUFFER, descriptorCount=2),
                                           VkDescriptorPoolSize(type=STORAGE_BUFFER, descriptorCount=1))
        pool = self._create("DescriptorPool", VkDescriptorPoolCreateInfo(
            maxSets=1, poolSizeCount=2, pPoolSizes=sizes))
        info = VkDescriptorSetAllocateInfo(
            descriptorPool=pool, descriptorSetCount=1, pSetLayouts=c_uint64(self.set_layout))
        descriptor_set = c_uint64()
        self.vk.vkAllocateDescriptorSets(self.device, byref(info), byref(descriptor_set))
        self.descriptor_set = descriptor_set.value

    def _make_commands(self):
        self.command_pool = self._create("CommandPool", VkCommandPoolCreateInfo(
            queueFamilyIndex=self.physical.queue_families[0]))
        info = VkCommandBufferAllocateInfo(commandPool=self.command_pool, commandBufferCount=1)
        commands = c_void_p()
        self.vk.vkAllocateCommandBuffers(self.device, byref(info), byref(commands))
        self.commands = commands.value
        self.fence = c_uint64(self._create("Fence", VkFenceCreateInfo()))

    def matmul(self, a, b):
        """Return the product of two matrices as a list of rows."""
        shape_of(b, "b")  # zip would drop what is too long
        return self.matmuls([a], [list(zip(*b))])[0]

    def matmuls(self, many_rows, many_columns):
        """Return the products, as rows, of matrices given as rows with matrices given as columns.

        Raises ValueError for shapes that do not fit, and VulkanError for all else, such as a string."""
        with self._lock:
            if self.closed:
                raise VulkanError("this VulkanGemm is closed")
            self._finish_pending()
            self.shader_seconds = 0.0
            try:
                return self._matmuls(many_rows, many_columns)
            except (TypeError, OverflowError, struct.error) as error:
                raise VulkanError(f"not a matrix of numbers: {error}") from None

    def _matmuls(self, many_rows, many_columns):
        """Do what matmuls does, in halves if it is too much at once."""
        products, sizes = self._lay_out(many_rows, many_columns)
        if not products:
            return []
        longest = max([max(m, n) for m, n, *_ in products])
        terms = sum(m * n * k for m, n, k, *_ in products)
        if (terms > MAX_TERMS or longest > MAX_GROUPS * TILE
                or any(size > buffer.limit for size, buffer in zip(sizes, self.buffers))):
            half = len(products) // 2
            if half:
                return (self._matmuls(many_rows[:half], many_columns[:half])
                        + self._matmuls(many_rows[half:], many_columns[half:]))
            rows, columns, half = many_rows[0], many_columns[0], longest // 2
            if half and len(rows) == longest:
                return [sum(self._matmuls([rows[:half], rows[half:]], [columns, columns]), [])]
            if half:
                return [list(map(list, zip(*self._matmuls([columns], [rows])[0])))]  # (A B)^T = B^T A^T
        self._reserve(sizes)
        for rows, columns, (_, _, k, a, b, _) in zip(many_rows, many_columns, products):
            write_rows(rows, round_up(k, 4) // 4, self.buffers[0], a)
            write_rows(columns, round_up(k, 4) // 4, self.buffers[1], b)
        start = self.clock()
        self._record(products)
        self._submit()
        self.shader_seconds += self.clock() - start
        return [read_rows(self.buffers[2], c, m, n) for m, n, _, _, _, c in products]

    @staticmethod
    def _lay_out(many_rows, many_columns):
        """Return (m, n, k, a, b, c) for each product, a, b and c its offsets in the three buffers, and how
        large the buffers must be, all in bytes."""
        if len(many_rows) != len(many_columns):
            raise ValueError(f"{len(many_rows)} matrices as rows and {len(many_columns)} as columns")
        products, sizes = [], (0, 0, 0)
        for rows, columns in zip(many_rows, many_columns):
            (m, k), (n, other_k) = shape_of(rows, "a"), shape_of(columns, "b")
            if k != other_k:
                raise ValueError(f"cannot multiply {m} x {k} by {other_k} x {n}")
            products.append((m, n, k, *sizes))
            ends = m * round_up(k, 4), n * round_up(k, 4), round_up(m * n, 4)
            sizes = [size + 4 * end for size, end in zip(sizes, ends)]
        return products, sizes

    def _reserve(self, sizes):
        """Grow the buffers if need be, and then tell the descriptor set where they are now."""
        for buffer, size in zip(self.buffers, sizes):
            if size > buffer.capacity:
                self._descriptors_stale = True
                buffer.reserve(size)
        if not self._descriptors_stale:
            return
        a, b, c = self.buffers
        inputs = VkWriteDescriptorSet(
            dstSet=self.descriptor_set, dstBinding=0, descriptorCount=2,  # bindings 0 and 1 in a row
            descriptorType=TEXEL_BUFFER, pTexelBufferView=(c_uint64 * 2)(a.view, b.view))
        result = VkWriteDescriptorSet(
            dstSet=self.descriptor_set, dstBinding=2, descriptorCount=1, descriptorType=STORAGE_BUFFER,
            pBufferInfo=VkDescriptorBufferInfo(buffer=c.handle, range=c.capacity))
        for write in (inputs, result):
            self.vk.vkUpdateDescriptorSets(self.device, 1, byref(write), 0, None)
        self._descriptors_stale = False

    def _record(self, products):
        vk, commands = self.vk, self.commands
        vk.vkResetCommandPool(self.device, self.command_pool, 0)  # also after an interrupted recording
        vk.vkBeginCommandBuffer(commands, byref(VkCommandBufferBeginInfo(flags=ONE_TIME_SUBMIT)))
        vk.vkCmdBindPipeline(commands, BIND_COMPUTE, self.pipeline)
        sets = c_uint64(self.descriptor_set)
        vk.vkCmdBindDescriptorSets(commands, BIND_COMPUTE, self.layout, 0, 1, byref(sets), 0, None)
        for m, n, k, a, b, c in products:
            for first in range(0, k, MAX_K):
                if first:
                    self._barrier(STAGE_COMPUTE, SHADER_READ | SHADER_WRITE)
                pitch, done = round_up(k, 4) // 4, first // 4
                constants = CONSTANTS.pack(m, n, min(MAX_K // 4, pitch - done), a // 16 + done,
                                           b // 16 + done, c // 4, pitch, first > 0)
                vk.vkCmdPushConstants(commands, self.layout, COMPUTE, 0, CONSTANTS.size, constants)
                vk.vkCmdDispatch(commands, -(-m // TILE), -(-n // TILE), 1)
        self._barrier(STAGE_HOST, HOST_READ)
        vk.vkEndCommandBuffer(commands)

    def _barrier(self, stage, access):
        """Record that what shaders wrote must be complete and visible before `stage` accesses it. Otherwise
        dispatches run side by side, as those do that write to different parts of C, and writes stay in
        caches. What the host wrote is visible from the submission on."""
        barrier = byref(VkMemoryBarrier(srcAccessMask=SHADER_WRITE, dstAccessMask=access))
        self.vk.vkCmdPipelineBarrier(self.commands, STAGE_COMPUTE, stage, 0, 1, barrier, 0, None, 0, None)

    def _submit(self):
        """Hand the command buffer to the device and wait until the fence says that it is done.

        An exception may interrupt this anywhere. Then `pending` stays set for _finish_pending(). Python
        handles signals only between two calls, so the wait is in slices."""
        info = VkSubmitInfo(commandBufferCount=1, pCommandBuffers=c_void_p(self.commands))
        self.pending = True
        self.vk.vkQueueSubmit(self.queue, 1, byref(info), self.fence)
        for _ in range(int(self.timeout / WAIT_SLICE)):
            if self.vk.vkWaitForFences(self.device, 1, byref(self.fence), 1, int(WAIT_SLICE * 1e9)) == 0:
                return self._reset_fence()
        self.closed = True
        self._undo.pop_all()  # it is still running: better to leak memory than to free what is in use
        raise VulkanError(f"{self.physical.name} has not finished after {self.timeout:g} seconds")

    def _finish_pending(self):
        """Wait for a submission that an exception interrupted. It may never have reached the device, and then
        its fence is never raised. So this waits for the queue, which is idle in either case."""
        if self.pending:
            self.vk.vkQueueWaitIdle(self.queue)
            self._reset_fence()

    def _reset_fence(self):
        self.vk.vkResetFences(self.device, 1, byref(self.fence))
        self.pending = False

# ---- The shader ------------------------------------------------------------------------------------------
# Vulkan takes shaders as SPIR-V, which glslc compiles from GLSL. This file carries gemm.comp compiled, along
# with the hash of its source. After an edit of gemm.comp, `python vulkan_gemm.py --compile` renews both.

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gemm.comp")

def source_hash():
    """Return the SHA-256 of gemm.comp, whichever way its lines end."""
    with open(SOURCE, "rb") as file:
        return hashlib.sha256(file.read().replace(b"\r\n", b"\n")).hexdigest()

def load_shader():
    if os.path.exists(SOURCE) and source_hash() != SHADER_SHA256:
        raise VulkanError("gemm.comp was edited: run `python vulkan_gemm.py --compile`, which needs glslc")
    return zlib.decompress(base64.b85decode(SHADER_SPIRV.replace("\n", "")))

def compile_shader():
    """Put the newly compiled shader and the hash of its source into this file."""
    done = subprocess.run(["glslc", SOURCE, "-o", "-"], stdout=subprocess.PIPE, check=True)
    lines = re.sub("(.{108})", r"\1\n", base64.b85encode(zlib.compress(done.stdout, 9)).decode())
    constants = f'SHADER_SHA256 = "{source_hash()}"\nSHADER_SPIRV = """\n{lines}\n"""\n'
    with open(__file__, encoding="utf-8", newline="") as file:
        text = re.sub(r'(?ms)^SHADER_SHA256 = .*?"""\n.*?"""\n', constants, file.read())
    with open(__file__, "w", encoding="utf-8", newline="") as file:
        file.write(text)

SHADER_SHA256 = "fbcb63fc882c67d45658bed87c3903cdb28a898c6d649940de2dc17c9c9fee10"
SHADER_SPIRV = """
c-noJ3z(E;7018X+1c5RO9&{CKqNY)@oa*MTw)avS7dQfR1mCjc6Pzh*%{oKg|sq2FhMIV?{~rSZkm}WSO{2I23eM1Woc$?Xr-j0W_Hduzq6
kGo_*YXzUTeU|J*O{`+gIz8l4P+SkNcv7u3aq@Nd7MDu}Vx%i1TX3F*eBxlQ$@a%=sOM;)$m{eyTYue^_oOhVRbdD=6%g5rJU86bFdXe$V6c
~m|w|5dVXiK$MV*iO%we`-2gER;Kn`ShZEaalT3E_dWwI?HV(mHC*;G&VOkHqA(9mn=z_%ID|X()nDWE!~>yXv>y!OWRbg*2(1x*?ecK7f6V
Nk1-)}XiOc&W%6Dd#=JP6Zp;^3GWnT>rNwNfoGTV)9v8}12Lolz7W19$1*H?gFrlXx3#D?VP?j*mY=>3K7|eFG=6sT)HTPK|U9q8+%%m6PI!
fhkOyg{cU|QpB1gnu}Nv@nd+u2L1z1G%}<#-@5>AUtc$NP9$&mp&IvX(mAyLFmmJ(u@+-8$7li>!+}itXu4g|}FJA-BTWTVrx972aCS2f15Z
3>)10W~aYP^U7zkZO~n^p3+w8%$F;5>>{Tux_h7-h1WNn+aMS&&k58-|3<SK76YqxSQS{U!{T6l9aarCz+nln!49hd8|ttm*zhpkc(-4TUF&
&}%SGu=IeKk`zZQNBdN)2Tr>;ou>aUBORDMsy-X82(Jhib(Ej7kLf>wq6c&M-M`-_bF8-<NgLMO>l@z27qqozZ`-CW_tk?%wNicf~_3ugNLo
c;dry!}C7gC(jVvW^sMR{xKB)ZQnEZy5fSJ`hav8%}-}kJ2MtJR^~<ar_kW2S}C;=nog(F|sxwuk^999s{kmrc%3Ov8A#zoUh~IH#lE&>4nx
d4X+yeXUUp&_A}_873NzPv?8Afdj4@8NFCyV?!i{{7lF4?E2S5MSv)y<Yjnxg`m6X)JN>m0{mY2o=;w)Vgjn58yd#<8-PrvHHR!^w(tE(n&T
IHq`8VOItuYdv&YsSC9ktSV8ZTa}h$SGWeS#$Lkz}Tmjvg4H>m&4dM{BRAMfgn-dY+>*oS~k-!qHmWH4*+T5qd*}-W;KKIa+7!b?B**b^q|L
uk20Tk5kxt1He~_Obz#a9e4wG?0(M1U~CL>HueWM8wYgnzlx24U?xA5+N(|7f1hN}j&L%g!0#8CA)ISN!S58AA)I}Rzb!rvrqAyR?;y_1gX#
HbXZH~LY`#B@@064I47m9|6g|b?5qoA=*EglYDsvdIB#<9XTw`2ZhlTSTgqZ5<`}?w6^?eMrs;58d=X1#E`j+UAm318ZTlq)8Kf=X+By;-!u
^$CiM+{2qN8ng=56AC#=l5uMN8@**tdpGI$?zvTzn^D+nBOU2=2z(n@=Qc`g43N&%tjxFt*JsCAKqn^y*3@5#@oo*s_{(1<|Jq11Z*s4CTD`
BT)s0S`A&o$2R+W&JCPX8-Yl?`>)WhI-^Rjga<!ceZ#K1UmURv@qWqKLpX_{}!r5Xodnz+K*U6j)ZuLJMz0;`w>3qjFWB(*#o9AMi4{tuPEs
%Ag>-(AT&vbsjz&U4rzX)c1SNaTj7NC2E)6Jr*wBAW)b01lr=a6U4>6{C0be^-s=yq&cp9;vdJG;eR&YLCRE73a-Y*2XKB}1%(TBNXhp0ioT
X35#?1h;c>DK<J?e9Opbsnh!s{Wh8NkyHFD+=mx{w+gNI`<JO-T6EH(Tm`#;81;U+kUJ<#?=M77d%KYSEOc>vEmF(nU@12{%OkV10Nx5WS1a
MIWUf}py4uav#qck7zQ4}>XmfQ5n9Y^a7lpO0=w9UJ=u*B*tT*4FH<vm4-vl@MTigpqUygsv{R(6*cXq$s%iZxEaGRqm!TcOu<>u%LWX$H(z
0A=y;5J9sV&fVY-*x14t<$?cGDkNccfFgV8^LXkZlZoRM>m7rNMF~0HSk-|dVDK=xRoBSlXbo8@$K+$ckz9fZyf9K_rR>jO5Y~WI&^Pyx_6*
!^qus}=)2(C?BC7o--V3kb`QAG_wo&PrReCl<$cK9>+Yiaxr^?==M=v4zYlK(x(|Te=X4*8=xPlgL{@9Go;=sPJbpkP*29OuQmzLNMS8FfdN
uTFXYYrRxqcWd<@W8vk$t-gdJgm)XYWUm8G8gQ<?g;mB6nXiybW%C9)<TP^RrRbO>TZ3hyS?q{bRm~ZGL_NX7i);WAbc7_c8o#c7C6L_XK{o
%DT<@eG>kY&hJn8_BOvi12ex$Z;@v!x?7y?&m;HMQ{-Uv`vo#jxijIHz1&w%gIf&0LicIDJ9oJ6PUUTvX9w|YcXoaqIrp9+H;d;t$UNiX`E4
)f-m~Bq&+pKEmO7g69qya?_r$#g`R&BM)5Web&&jhB{pVa9e;|(MT^xS|H~LSJdcP2<_n(n@!P)&wFZsO)ZfEdI=)UM|{T2T&IlY&uugUxkx
tE>HE0LQ29l2MS*Ii&H|0=)rEZ%<-?`uxxU*Px9kAH*pqsDt(jg|LC_*<k><2Rh0|8)DR34eFL#c%Tw@a+718=mRyqs~UZLymS9zROv-51!e
151yT)|Hbxu)Z%q8ovFRV`@Zw@zlh%tB7SvaPebkl=QkFs@XUwO-p5`iTNSJPwzitYV;|P!RpL~v3L7@NJBfQ6^fnh~b*$$MBw`gT<<6``tm
m1v6?>bYH#vJXv7U3Dj8(9dJA0F{o@ehyeveL&=l{{jcMJ
"""

# ---- Which products gain ---------------------------------------------------------------------------------
# In plain Python a product costs so much for each multiplication, and zeros are skipped. On the device it
# costs a trip, so much for each number that travels, and so much for each multiplication of whole blocks. All
# four are measured once. Then each call goes where it is cheaper.

def offload(gpu, plain_matmuls):
    """Return a function of a list of matrices as rows and a list of matrices as columns. It computes their
    products on the GPU if that is faster than plain_matmuls, which does the same."""
    def seconds(matmuls, n):
        """Return the shortest of six times of a product of n x n matrices: in all, and on the device."""
        matrix = [[0.1 + 0.01 * (i + j) for i in range(n)] for j in range(n)]
        times = []
        for _ in range(6):
            start = gpu.clock()
            matmuls([matrix], [matrix])
            times.append((gpu.clock() - start, gpu.shader_seconds))
        return min(times)

    check_products(gpu)
    plain_term = seconds(plain_matmuls, 32)[0] / 32 ** 3
    trip, trip_on_device = seconds(gpu.matmuls, 8)  # counted twice below: it takes longer amid other work
    total, on_device = seconds(gpu.matmuls, 128)
    number = (total - on_device) / (3 * 128 ** 2)
    term = max(0.0, on_device - trip_on_device) / 128 ** 3

    def filled(rows):
        """Return about how much of the plain product's time remains, as it skips zeros."""
        some = rows[::7]  # 7, as lengths are often powers of two
        return min(1.0, 2 - 2 * sum(row.count(0.0) for row in some) / (len(some) * len(some[0])))

    def gain(rows, columns):
        """Return how many seconds a product costs less on the GPU, without the trip."""
        m, k, n = len(rows), len(rows[0]), len(columns)
        plain = m * n * k * plain_term * min(filled(rows), filled(columns))
        on_device = round_up(m, TILE) * round_up(n, BLOCK) * k * term
        return plain - (m * k + k * n + m * n) * number - on_device

    def matmuls(many_rows, many_columns):
        terms = sum([len(a) * len(a[0]) * len(b) for a, b in zip(many_rows, many_columns)])
        if terms * plain_term > 2 * trip and sum(map(gain, many_rows, many_columns)) > 2 * trip:
            return gpu.matmuls(many_rows, many_columns)
        return plain_matmuls(many_rows, many_columns)

    return matmuls

def check_products(gpu):
    """Raise VulkanError if products of awkward shapes differ from plain Python's."""
    rng = Random(1)
    for m, n, k in (1, 1, 1), (17, 33, 1), (9, 5, 130), (65, 66, 18), (1, 2, MAX_K + 3):
        rows, columns = ([[rng.uniform(-1, 1) for _ in range(k)] for _ in range(size)] for size in (m, n))
        for row, results in zip(rows, gpu.matmuls([rows], [columns])[0]):
            for column, result in zip(columns, results):
                if not abs(result - sum(map(mul, row, column))) < 1e-3:  # a NaN is not less, either
                    raise VulkanError(f"{gpu.physical.name} computes wrong products: {m} x {k} by {k} x {n}")

def main(arguments):
    if arguments == ["--compile"]:
        return compile_shader()
    try:
        with VulkanGemm() as gpu:
            for index, device in enumerate(list_devices(gpu.vk, gpu.instance)):
                print(f"device {index}: {device.name} ({device.kind})")
            check_products(gpu)
            print(f"{gpu.physical.name} computes right products")
    except VulkanError as error:
        sys.exit(f"vulkan_gemm: {error}")

if __name__ == "__main__":
    main(sys.argv[1:])
